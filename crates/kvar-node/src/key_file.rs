//! The key of a namespace, and which store it belongs to.
//!
//! ```text
//!   <data>.key, mode 0600, TOML:
//!     uuid = "32 hex"            the device this key was made with
//!     namespace_key = "64 hex"   the secret: without it no block can be named
//!
//!   <data>.NAME.key, the same, and:
//!     namespace = "NAME"         whose key it is; none: the default one's
//!     number = 1                 what the devices know it by
//! ```
//!
//! What must always be true: the file is made once, exclusively, and is on disk before the device
//! is formatted; it is never overwritten. A file that others can read is refused, because a secret
//! that leaked must be noticed and not used on.
//!
//! What is absent: rotating keys; which namespaces there are (`namespaces`).

use kvar_base::{DeviceUuid, NamespaceKey};
use serde::Deserialize;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Largest key file that is read; a real one has about 300 bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What a key file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFile {
    /// The device the key was made with.
    pub uuid: DeviceUuid,
    /// The key.
    pub key: NamespaceKey,
    /// Whose it is; `None`: the default namespace's.
    pub namespace: Option<KeyName>,
}

/// Whose key it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyName {
    /// The namespace.
    pub name: String,
    /// What devices know it by.
    pub number: u8,
}

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// Not there.
    #[error(
        "no key file at {}: name the node's key with --key-file (it lies beside the node's data as \
         <data>.key)", path.display()
    )]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Others may read it.
    #[error(
        "key file {} can be read by others (mode {mode:03o}): a namespace key is a secret; run \
         chmod 600 {}", path.display(), path.display()
    )]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not what a key file looks like.
    #[error(
        "key file {} is damaged: {reason}; restore it from a backup (without it the stored blocks \
         cannot be named)", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// It appeared while it was being made.
    #[error("key file {} exists already and is not overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("key file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its words.
        source: std::io::Error,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    uuid: String,
    namespace_key: String,
    namespace: Option<String>,
    number: Option<u8>,
}

impl KeyFile {
    /// A fresh key for a device.
    #[must_use]
    pub fn generate(uuid: DeviceUuid) -> Self {
        Self {
            uuid,
            key: NamespaceKey::random(),
            namespace: None,
        }
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// When it is not there, may be read by others, or is damaged.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let io = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::NotFound => KeyFileError::Missing { path: path.into() },
            _ => KeyFileError::Io {
                path: path.into(),
                source,
            },
        };
        let mut file = File::open(path).map_err(io)?;
        let mode = file.metadata().map_err(io)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyFileError::Permissions {
                path: path.into(),
                mode,
            });
        }
        let mut text = String::new();
        let damaged = |reason: String| KeyFileError::Damaged {
            path: path.into(),
            reason,
        };
        match (&mut file).take(FILE_BYTES_MAX).read_to_string(&mut text) {
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                return Err(damaged("it is not text".into()));
            }
            read => read.map_err(io)?,
        };
        let form: Form = toml::from_str(&text).map_err(|error| {
            // The parser's own rendering quotes the line, and the line may hold the secret.
            damaged(error.message().trim().to_owned())
        })?;
        let uuid = form
            .uuid
            .parse()
            .map_err(|error| damaged(format!("uuid: {error}")))?;
        let key = form
            .namespace_key
            .parse()
            .map_err(|error| damaged(format!("namespace_key: {error}")))?;
        let namespace = match (form.namespace, form.number) {
            (None, None) => None,
            (Some(name), Some(number)) => Some(KeyName { name, number }),
            _ => return Err(damaged("namespace and number belong together".into())),
        };
        Ok(Self {
            uuid,
            key,
            namespace,
        })
    }

    /// Writes it to a new file of mode 0600 and waits until it is on disk.
    ///
    /// # Errors
    /// When the file exists, or the system refuses.
    pub fn create(&self, path: &Path) -> Result<(), KeyFileError> {
        let io = |source: std::io::Error| KeyFileError::Io {
            path: path.into(),
            source,
        };
        // Written under another name and linked into place: a kill half-way never leaves a half
        // key behind, and `hard_link` refuses to replace a file that is there.
        let mut draft_path = path.as_os_str().to_owned();
        draft_path.push(format!(".{}.draft", std::process::id()));
        let draft_path = PathBuf::from(draft_path);
        let _ = std::fs::remove_file(&draft_path);
        let made = (|| {
            let mut draft = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&draft_path)?;
            let whose = self.namespace.as_ref();
            let name = whose.map_or("default", |whose| &whose.name);
            write!(
                draft,
                "# Key of this kvar node's {name} namespace. A secret: who has it can read and\n\
                 # write the stored blocks, who lost it can no longer name them.\n\
                 uuid = \"{}\"\nnamespace_key = \"{}\"\n",
                self.uuid,
                self.key.to_hex()
            )?;
            if let Some(KeyName { name, number }) = whose {
                // A name has no character that TOML would take for another.
                write!(draft, "namespace = \"{name}\"\nnumber = {number}\n")?;
            }
            draft.sync_all()?;
            std::fs::hard_link(&draft_path, path)
        })();
        let _ = std::fs::remove_file(&draft_path);
        made.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => KeyFileError::Exists { path: path.into() },
            _ => io(error),
        })?;
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nobody_else_can() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.key");
        let key = KeyFile::generate(DeviceUuid::random());
        assert!(matches!(
            KeyFile::read(&path),
            Err(KeyFileError::Missing { .. })
        ));
        key.create(&path).unwrap();
        assert_eq!(KeyFile::read(&path).unwrap(), key);
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no draft stays behind"
        );

        let other = KeyFile::generate(DeviceUuid::random());
        assert!(matches!(
            other.create(&path),
            Err(KeyFileError::Exists { .. })
        ));
        assert_eq!(KeyFile::read(&path).unwrap(), key);

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = KeyFile::read(&path).unwrap_err().to_string();
        assert!(
            error.contains("chmod 600") && error.contains("640"),
            "{error}"
        );
    }

    #[test]
    fn a_damaged_file_is_named_and_its_secret_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.key");
        let secret = "5ec2e7".repeat(10);
        for text in [
            "",
            "uuid = \"1\"\nnamespace_key = \"SECRET\"",
            "uuid = \"00112233445566778899aabbccddeeff\"\nnamespace_key = \"SECRET\"",
            "uuid = \"00112233445566778899aabbccddeeff\"\nnamespace_key = SECRET",
            "\u{0}\u{1}",
        ] {
            std::fs::write(&path, text.replace("SECRET", &secret)).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            let error = KeyFile::read(&path).unwrap_err().to_string();
            assert!(
                error.contains("damaged") && !error.contains(&secret),
                "{error}"
            );
        }
    }
}

//! A namespace as settings name it: a table of the file, or one line of text.

use super::Config;
use kvar_engine::WEIGHT_MAX;
use std::path::PathBuf;
use toml::de::{DeTable, DeValue};

/// Longest name: it is part of a file's name and of every metric's label.
const NAME_CHARACTERS_MAX: usize = 63;

/// A namespace of the settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceConfig {
    /// Its name.
    pub name: String,
    /// What it weighs against the others; 0: it has what they leave.
    pub share: u32,
    /// Where its key is; `None` is beside the data.
    pub key_file: Option<PathBuf>,
}

impl NamespaceConfig {
    /// A namespace of this name with a share of 1.
    ///
    /// # Errors
    /// When there can be no such name.
    pub fn new(name: &str) -> Result<Self, String> {
        let is_fine = |at: usize, character: char| match character {
            '-' | '_' | '.' => at > 0,
            _ => character.is_ascii_alphanumeric(),
        };
        let is_short = (1..=NAME_CHARACTERS_MAX).contains(&name.len());
        let mut characters = name.chars().enumerate();
        if !is_short || !characters.all(|(at, character)| is_fine(at, character)) {
            return Err(format!(
                "{name:?} is no name: write 1 to {NAME_CHARACTERS_MAX} letters, digits, - _ or ., beginning \
                 with a letter or digit"
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            share: 1,
            key_file: None,
        })
    }

    /// Whether it is the one that is there anyway.
    #[must_use]
    pub fn is_default(&self) -> bool {
        self.name == crate::namespaces::DEFAULT
    }

    /// Where its key is: the named file, or beside the key of the default one.
    #[must_use]
    pub fn key_path(&self, config: &Config) -> PathBuf {
        let beside = || config.beside_key(&format!("{}.key", self.name));
        self.key_file.clone().unwrap_or_else(beside)
    }

    /// Reads `NAME[,share=N][,key_file=PATH]`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.trim().split(',');
        let mut namespace = Self::new(parts.next().unwrap_or_default().trim())?;
        for part in parts {
            match part.split_once('=').map(|(key, value)| (key.trim(), value)) {
                Some(("share", value)) => {
                    let number = value.trim().parse::<i64>();
                    namespace.set_share(number.map_err(|_| not_whole("share"))?)?;
                }
                Some(("key_file", value)) => namespace.set_key_file(value)?,
                _ => {
                    return Err(format!(
                        "{part:?} is not known: write name[,share=N][,key_file=path]"
                    ));
                }
            }
        }
        Ok(namespace)
    }

    /// Reads a `[[namespace]]` table.
    pub(crate) fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let DeValue::Table(table) = value else {
            return Err("write all of them as [[namespace]] tables, or all as texts".into());
        };
        let mut namespace = Self::new(&text_of(table, "name")?.ok_or(
            "a name is needed, such as name = \"team-a\", and may be followed by share and key_file",
        )?)?;
        for (key, value) in table {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("name", _) => {}
                ("share", DeValue::Integer(number)) => {
                    let number = number.to_string().parse();
                    namespace.set_share(number.map_err(|_| not_whole("share"))?)?;
                }
                ("share", _) => return Err(not_whole("share")),
                ("key_file", _) => {
                    let path = text_of(table, "key_file")?;
                    namespace.set_key_file(&path.unwrap_or_default())?;
                }
                (key, _) => {
                    return Err(format!(
                        "unknown key `{key}`: a namespace has name, share and key_file"
                    ));
                }
            }
        }
        Ok(namespace)
    }

    fn set_share(&mut self, share: i64) -> Result<(), String> {
        let fits = u32::try_from(share)
            .ok()
            .filter(|share| *share <= WEIGHT_MAX);
        self.share = fits.ok_or_else(|| {
            format!("share: {share} is outside 0 to {WEIGHT_MAX} (0: what the others leave)")
        })?;
        Ok(())
    }

    fn set_key_file(&mut self, path: &str) -> Result<(), String> {
        if self.is_default() && !path.is_empty() {
            return Err(
                "key_file: the default namespace's key is named by the setting key_file".into(),
            );
        }
        self.key_file = (!path.is_empty()).then(|| PathBuf::from(path));
        Ok(())
    }
}

fn not_whole(key: &str) -> String {
    format!("{key}: a whole number is needed, such as {key} = 2")
}

fn text_of(table: &DeTable<'_>, key: &str) -> Result<Option<String>, String> {
    match table.get(key).map(toml::Spanned::get_ref) {
        None => Ok(None),
        Some(DeValue::String(text)) => Ok(Some(text.to_string())),
        Some(_) => Err(format!("{key}: expected a text in quotes")),
    }
}

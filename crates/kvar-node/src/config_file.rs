//! Settings as TOML and as a page of documentation.
//!
//! Keys are flat: a settings file is a list of `key = value` lines, and every error names the line. The
//! one exception are namespaces, a table each.
//! The sample and the reference page are printed from [`SETTINGS`], so they cannot fall behind.

use crate::config::{Config, ConfigError, NamespaceConfig, SETTINGS, unknown_key};
use std::fmt::Write as _;
use std::path::Path;
use toml::de::{DeTable, DeValue};

impl Config {
    /// Reads a settings file over `self`: keys it does not name keep their value.
    ///
    /// # Errors
    /// The first line that cannot be used, and why.
    pub fn merge_toml(&mut self, text: &str, origin: Option<&Path>) -> Result<(), ConfigError> {
        let wrong = |offset: Option<usize>, message: String| ConfigError {
            origin: origin.map(Path::to_path_buf),
            line: offset.map(|offset| line_of(text, offset)),
            message,
        };
        let table = DeTable::parse(text).map_err(|error| {
            let offset = error.span().map(|span| span.start);
            wrong(offset, format!("not TOML: {}", error.message().trim()))
        })?;
        // Line order, so that the first mistake in the file is the one that is named.
        let mut entries: Vec<_> = table.get_ref().iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (key, value) in entries {
            let (name, at) = (key.get_ref().as_ref(), Some(key.span().start));
            if !SETTINGS.iter().any(|setting| setting.key == name) {
                return Err(wrong(at, unknown_key(name)));
            }
            if let DeValue::Array(tables) = value.get_ref()
                && name == "namespace"
                && tables
                    .iter()
                    .any(|it| matches!(it.get_ref(), DeValue::Table(_)))
            {
                self.namespaces.clear();
                for table in tables {
                    let at = Some(table.span().start);
                    let namespace = NamespaceConfig::from_toml(table.get_ref());
                    let namespace =
                        namespace.map_err(|error| wrong(at, format!("{name}: {error}")))?;
                    self.namespaces.push(namespace);
                }
                continue;
            }
            let is_list = |name| SETTINGS.iter().any(|it| it.key == name && it.is_list);
            let value = match value.get_ref() {
                DeValue::Array(values) if is_list(name) => {
                    let texts = values.iter().map(|value| match value.get_ref() {
                        DeValue::String(text) => Some(text.to_string()),
                        _ => None,
                    });
                    match texts.collect::<Option<Vec<_>>>() {
                        Some(texts) if !texts.is_empty() => {
                            self.set_all(name, &texts)
                                .map_err(|error| wrong(at, format!("{name}: {error}")))?;
                            continue;
                        }
                        _ => {
                            let message = "expected a list of texts in quotes";
                            return Err(wrong(at, format!("{name}: {message}")));
                        }
                    }
                }
                DeValue::String(text) => text.to_string(),
                DeValue::Integer(number) => number.to_string(),
                DeValue::Boolean(yes) => yes.to_string(),
                _ => {
                    let message = "expected a text in quotes, a whole number, true or false";
                    return Err(wrong(at, format!("{name}: {message}")));
                }
            };
            self.set(name, &value)
                .map_err(|error| wrong(at, format!("{name}: {error}")))?;
        }
        Ok(())
    }

    /// Reads a settings file from disk over the defaults.
    ///
    /// # Errors
    /// When it cannot be read, or as [`Config::merge_toml`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError {
            origin: Some(path.to_path_buf()),
            line: None,
            message: format!("cannot be read ({error}); `kvar config sample` prints one to start"),
        })?;
        let mut config = Self::default();
        config.merge_toml(&text, Some(path))?;
        Ok(config)
    }
}

/// A settings file with every key at its default, each with its sentence.
#[must_use]
pub fn sample() -> String {
    let mut out = String::from(
        "# Settings of a kvar node. Every key is optional; flags of `kvar serve` override them.\n\
         # `kvar config check FILE` tells whether a file can be used.\n",
    );
    for setting in SETTINGS {
        out.push('\n');
        for line in wrap(setting.help, 94) {
            let _ = writeln!(out, "# {line}");
        }
        let _ = writeln!(out, "# Form: {}.", setting.form);
        let bare = matches!(setting.form, "number" | "true or false" | "microseconds");
        let _ = match (setting.default, bare) {
            ("", _) => writeln!(out, "# {} = \"\"", setting.key),
            (default, true) => writeln!(out, "{} = {default}", setting.key),
            (default, false) => writeln!(out, "{} = \"{default}\"", setting.key),
        };
    }
    out
}

/// The reference page `docs/reference/config.md`.
#[must_use]
pub fn reference_page() -> String {
    let mut out = String::from(
        "# Settings\n\n\
         A settings file is TOML with flat keys; every key is optional. `kvar serve --config FILE`\n\
         reads it, a flag of the same name (dashes for underscores) overrides it. `kvar config\n\
         sample` prints a file to start from, `kvar config check FILE` tells whether one can be\n\
         used. An unknown key is an error. Sizes: `4096`, `64KiB`, `1.5GiB`, `3TB`. Durations:\n\
         `250ms`, `1s`, `2m`.\n\n\
         | key | flag | default | form | what |\n|---|---|---|---|---|\n",
    );
    for setting in SETTINGS {
        let default = match setting.default {
            "" => "none".to_owned(),
            default => format!("`{default}`"),
        };
        let _ = writeln!(
            out,
            "| `{}` | `--{}` | {default} | {} | {} |",
            setting.key,
            setting.flag(),
            setting.form.replace('|', "\\|"),
            setting.help
        );
    }
    out
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())]
        .iter()
        .filter(|byte| **byte == b'\n')
        .count()
        + 1
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("starts with one line");
        if !line.is_empty() && line.len() + 1 + word.len() > width {
            lines.push(word.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvar_base::ByteSize;
    use std::time::Duration;

    fn error_of(text: &str) -> String {
        let mut config = Config::default();
        let read = config.merge_toml(text, Some(Path::new("kvar.toml")));
        read.and_then(|()| config.validate())
            .expect_err(text)
            .to_string()
    }

    #[test]
    fn the_sample_is_the_defaults() {
        let mut config = Config::default();
        config.merge_toml(&sample(), None).unwrap();
        assert_eq!(config, Config::default());
        config.validate().unwrap();
        for setting in SETTINGS {
            assert!(
                sample().contains(&format!("{} = ", setting.key)),
                "{}",
                setting.key
            );
        }
    }

    #[test]
    fn values_carry_units() {
        let mut config = Config::default();
        let text = "size = \"3TB\"\nflush_after = \"250ms\"\nshards = 4\ninsecure = true\n\
                    listen = \"0.0.0.0:9000\"\nspin_us = 50\nlog_format = \"json\"\n";
        config.merge_toml(text, None).unwrap();
        config.validate().unwrap();
        assert_eq!(config.size, Some(ByteSize(3_000_000_000_000)));
        assert_eq!(config.flush_after, Duration::from_millis(250));
        assert_eq!(config.shards.unwrap().get(), 4);
        assert_eq!(config.key_path(), Path::new("./kvar-data.key"));
    }

    #[test]
    fn several_devices_are_a_list_and_each_may_have_a_size() {
        let mut config = Config::default();
        let text = "data = [\"/a/kvar\", \"/b/kvar=2TB\", \"/c/x=y\"]\nsize = \"1TB\"\n";
        config.merge_toml(text, None).unwrap();
        config.validate().unwrap();
        let found: Vec<_> = config
            .data
            .iter()
            .map(|data| (data.path.to_str().unwrap(), data.size))
            .collect();
        let two = Some(ByteSize(2_000_000_000_000));
        assert_eq!(
            found,
            [("/a/kvar", None), ("/b/kvar", two), ("/c/x=y", None)]
        );
        assert_eq!(config.key_path(), Path::new("/a/kvar.key"));
        assert_eq!(config.table_path(), Path::new("/a/kvar.devices"));
        // Flags replace the list as a whole.
        let flags = ["/d".to_owned(), "/e".to_owned()];
        config.set_all("data", &flags).unwrap();
        assert_eq!(config.data.len(), 2);
        assert!(config.set_all("dram", &flags).is_err());
    }

    #[test]
    fn namespaces_are_tables_or_a_list_and_mean_the_same() {
        let read = |text: &str| {
            let mut config = Config::default();
            config.merge_toml(text, None).unwrap();
            config.validate().unwrap();
            config.namespaces
        };
        let tables = read(
            "dram = \"1GiB\"\n[[namespace]]\nname = \"team-a\"\nshare = 2\n\
             [[namespace]]\nname = \"b\"\nkey_file = \"/k\"\n[[namespace]]\nname = \"default\"\nshare = 0\n",
        );
        let list = "namespace = [\"team-a,share=2\", \"b,key_file=/k\", \"default,share=0\"]";
        assert_eq!(tables, read(list));
        let found: Vec<_> = tables.iter().map(|it| (&*it.name, it.share)).collect();
        assert_eq!(found, [("team-a", 2), ("b", 1), ("default", 0)]);
        assert_eq!(tables[1].key_file.as_deref(), Some(Path::new("/k")));
        let config = Config::default();
        let path = tables[0].key_path(&config);
        assert_eq!(path, Path::new("./kvar-data.team-a.key"));
    }

    #[test]
    fn mistakes_name_the_line_and_the_way_out() {
        let check = |text: &str, parts: &[&str]| {
            let error = error_of(text);
            for part in parts {
                assert!(error.contains(part), "{error:?} lacks {part:?}");
            }
        };
        check(
            "dram = \"1GiB\"\n\nflush_afer = \"1s\"\n",
            &[
                "kvar.toml:3:",
                "flush_afer",
                "did you mean `flush_after`?",
                "kvar config sample",
            ],
        );
        check("qqqqqq = 1", &["kvar.toml:1:", "unknown setting `qqqqqq`"]);
        check(
            "[node]\ndram = 1",
            &["kvar.toml:1:", "unknown setting `node`"],
        );
        check("dram = \"lots\"", &["kvar.toml:1: dram:", "64KiB"]);
        check("dram = 1.5", &["kvar.toml:1: dram:", "whole number"]);
        check(
            "# x\nshards = 0",
            &["kvar.toml:2: shards:", "from 1 to 256"],
        );
        check("flush_after = \"soon\"", &["250ms"]);
        check("flush_after = \"0s\"", &["flush_after", "more than zero"]);
        check("listen = \"7411\"", &["127.0.0.1:7411"]);
        check("listen = \"0.0.0.0:7411\"", &["--insecure"]);
        check("admin = \"127.0.0.1:7411\"", &["admin", "choose another"]);
        check("dram = \"1MiB\"", &["dram", "at least 16MiB"]);
        check("link_budget = \"1MiB\"", &["at least 16MiB"]);
        check(
            "expected_block_bytes = \"1GiB\"",
            &["expected_block_bytes", "4KiB to 16MiB"],
        );
        check("dram = ", &["kvar.toml:1:", "not TOML"]);
        check("dram = 1\ndram = 2", &["kvar.toml:2:", "duplicate key"]);
        check("data = []", &["kvar.toml:1: data:", "list of texts"]);
        check("data = [1]", &["kvar.toml:1: data:", "list of texts"]);
        check("data = \"\"", &["kvar.toml:1: data:", "a path is needed"]);
        check("dram = [\"1GiB\"]", &["kvar.toml:1: dram:", "whole number"]);
        check("data = [\"/a\", \"/a=1GiB\"]", &["named twice"]);
        check("missing_device = \"maybe\"", &["start, refuse"]);
        let namespace = |text: &str, parts: &[&str]| {
            check(&format!("dram = \"1GiB\"\n\n[[namespace]]\n{text}"), parts);
        };
        namespace("", &["kvar.toml:3: namespace:", "a name is needed"]);
        namespace("name = 1", &["kvar.toml:3:", "name", "text in quotes"]);
        namespace("name = \"a/b\"", &["kvar.toml:3:", "\"a/b\"", "letters"]);
        namespace("name = \"\"", &["kvar.toml:3:", "1 to 63"]);
        namespace(
            "name = \"a\"\nshares = 2",
            &["kvar.toml:3:", "shares", "share"],
        );
        namespace("name = \"a\"\nshare = -1", &["share", "0 to 1000000"]);
        namespace("name = \"a\"\nshare = \"much\"", &["share", "whole number"]);
        namespace(
            "name = \"a\"\n[[namespace]]\nname = \"a\"",
            &["named twice"],
        );
        namespace(
            "name = \"default\"\nkey_file = \"x\"",
            &["setting key_file"],
        );
        check("namespace = [\"a,part=2\"]", &["part", "share=N"]);
        check("io_engine = \"spdk\"", &["auto, io_uring or threads"]);
    }

    #[test]
    fn the_reference_page_is_in_step() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../docs/reference/config.md"
        );
        if std::env::var_os("KVAR_WRITE_DOCS").is_some() {
            std::fs::create_dir_all(Path::new(path).parent().unwrap()).unwrap();
            std::fs::write(path, reference_page()).unwrap();
        }
        let page = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            page == reference_page(),
            "docs/reference/config.md is behind the settings table; run \
             KVAR_WRITE_DOCS=1 cargo test -p kvar-node reference_page"
        );
    }
}

//! The node's settings as flags: one flag a row of [`SETTINGS`], with its sentence as help.
//!
//! A flag that is not given leaves the file's value, or the default.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use kvar_node::config::{Config, ConfigError, SETTINGS};
use std::path::PathBuf;

/// `--config FILE`, and every setting as a flag.
#[derive(Clone, Debug)]
pub(crate) struct SettingsArguments {
    file: Option<PathBuf>,
    given: Vec<(&'static str, String)>,
}

impl SettingsArguments {
    /// Defaults, then the file, then the flags; checked as a whole.
    pub(crate) fn config(&self) -> Result<Config, ConfigError> {
        let mut config = match &self.file {
            Some(path) => Config::load(path)?,
            None => Config::default(),
        };
        for (key, text) in &self.given {
            config.set(key, text).map_err(|message| ConfigError {
                origin: None,
                line: None,
                message: format!("--{}: {message}", key.replace('_', "-")),
            })?;
        }
        config.validate()?;
        Ok(config)
    }
}

impl FromArgMatches for SettingsArguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = SETTINGS.iter().filter_map(|setting| {
            let text = if setting.is_switch {
                matches.get_flag(setting.key).then(|| "true".to_owned())
            } else {
                matches.get_one::<String>(setting.key).cloned()
            };
            text.map(|text| (setting.key, text))
        });
        Ok(Self {
            file: matches.get_one::<PathBuf>("config").cloned(),
            given: given.collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for SettingsArguments {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("Settings file (TOML); flags override it. `kvar config sample` prints one");
        SETTINGS
            .iter()
            .fold(command.arg(config), |command, setting| {
                let help = match setting.default {
                    "" => setting.help.to_owned(),
                    default => format!("{} [default: {default}]", setting.help),
                };
                let arg = Arg::new(setting.key).long(setting.flag()).help(help);
                command.arg(if setting.is_switch {
                    arg.action(ArgAction::SetTrue)
                } else {
                    arg.value_name(
                        setting
                            .form
                            .to_uppercase()
                            .replace(' ', "-")
                            .replace('"', ""),
                    )
                })
            })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

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
    given: Vec<(&'static str, Vec<String>)>,
}

impl SettingsArguments {
    /// Defaults, then the file, then the flags; checked as a whole.
    pub(crate) fn config(&self) -> Result<Config, ConfigError> {
        let mut config = match &self.file {
            Some(path) => Config::load(path)?,
            None => Config::default(),
        };
        for (key, texts) in &self.given {
            config.set_all(key, texts).map_err(|message| ConfigError {
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
            let texts = if setting.is_switch {
                matches
                    .get_flag(setting.key)
                    .then(|| vec!["true".to_owned()])
            } else {
                let texts = matches.get_many::<String>(setting.key);
                texts.map(|texts| texts.cloned().collect())
            };
            texts.map(|texts| (setting.key, texts))
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
                    let action = if setting.is_list {
                        ArgAction::Append
                    } else {
                        ArgAction::Set
                    };
                    arg.action(action).value_name(
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

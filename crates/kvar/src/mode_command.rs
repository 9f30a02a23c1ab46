//! `kvar mode`: how much of the store engines use, shown and switched.

use crate::admin::AdminArguments;
use crate::failure::Outcome;
use crate::print;
use clap::Args;
use clap::builder::PossibleValue;
use serde_json::{Value, json};

/// Where the node shows and switches modes.
const PATH: &str = "/v1/modes";

/// A mode, as clap reads it.
#[derive(Clone, Copy, Debug)]
struct Word(kvar_base::Mode);

impl clap::ValueEnum for Word {
    fn value_variants<'a>() -> &'a [Self] {
        use kvar_base::Mode::{Load, Observe, Off, Save};
        &[Self(Off), Self(Observe), Self(Save), Self(Load)]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.word()))
    }
}

/// What is switched.
#[derive(Debug, Args)]
pub(crate) struct ModeArguments {
    /// off: engines ask for nothing; observe: lookups are counted, nothing is loaded or saved; save:
    /// puts too; load: everything. Not given: what holds is shown.
    #[arg(value_name = "MODE", value_enum)]
    mode: Option<Word>,
    /// This namespace alone. Not given: all that have no mode of their own.
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Forgets what was switched: a namespace does as all others again, and without --namespace all
    /// do as the node's settings say.
    #[arg(long, conflicts_with = "mode")]
    reset: bool,
    #[command(flatten)]
    admin: AdminArguments,
}

/// Runs the command.
pub(crate) fn run(arguments: &ModeArguments) -> Outcome {
    let ModeArguments {
        mode,
        namespace,
        reset,
        admin,
    } = arguments;
    let modes = if mode.is_some() || *reset {
        let mode = mode.map(|word| word.0);
        admin.change(PATH, &json!({ "mode": mode, "namespace": namespace }))?
    } else {
        admin.ask(PATH)?
    };
    if admin.json {
        return print::json(&modes);
    }
    let rows = modes.as_array().into_iter().flatten();
    let is_asked = |row: &&Value| {
        let name = row["namespace"].as_str();
        mode.is_some() || *reset || namespace.is_none() || name == namespace.as_deref()
    };
    let mut table = vec![
        ["namespace", "mode", "because of"]
            .map(str::to_owned)
            .to_vec(),
    ];
    table.extend(rows.filter(is_asked).map(row));
    if table.len() == 1 {
        let name = namespace.as_deref().unwrap_or_default();
        let text = format!("no namespace {name:?} on this node (kvar mode shows all there are)");
        return Err(crate::failure::Failure::failed(text));
    }
    print::table(&table)
}

fn row(mode: &Value) -> Vec<String> {
    let name = mode["namespace"].as_str();
    let because = match mode["set_by"].as_str() {
        Some("name") => "a switch of its own",
        Some("all") if name.is_some() => "the mode of all",
        Some("all") => "a switch",
        _ => "the node's settings",
    };
    vec![
        name.unwrap_or("(all)").to_owned(),
        mode["mode"].as_str().unwrap_or("-").to_owned(),
        because.to_owned(),
    ]
}

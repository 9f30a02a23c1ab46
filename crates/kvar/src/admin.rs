//! Talking to a node's admin HTTP: questions need nothing, changes carry a proof of the namespace
//! key, which itself stays here.

use crate::arguments::{KeyArguments, duration};
use crate::failure::Failure;
use clap::Args;
use kvar_node::{KeyFile, PROOF_HEADER, TIME_HEADER, admin_proof};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest answer that is read: 255 devices of about 400 bytes, with room.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// The admin door of a node on this machine.
#[derive(Clone, Debug, Args)]
pub(crate) struct AdminArguments {
    /// Where the node's admin HTTP answers.
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        env = "KVAR_ADMIN",
        default_value = "127.0.0.1:7412",
        visible_alias = "node"
    )]
    pub(crate) admin: String,
    #[command(flatten)]
    pub(crate) key: KeyArguments,
    /// How long to wait for the answer. A change goes on if nobody waits any more.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
    pub(crate) deadline: Duration,
    /// Print the outcome as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl AdminArguments {
    /// What the node says at `path`.
    pub(crate) fn ask(&self, path: &str) -> Result<Value, Failure> {
        self.read(self.agent().get(self.url(path)).call())
    }

    /// What comes of a change sent to `path`.
    pub(crate) fn change(&self, path: &str, action: &Value) -> Result<Value, Failure> {
        let key = KeyFile::read(&self.key.key_file)
            .map_err(Failure::usage)?
            .key;
        let body = action.to_string();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |elapsed| elapsed.as_secs());
        let proof = admin_proof(&key, path, now, body.as_bytes());
        let request = self.agent().post(self.url(path));
        let request = request
            .header("content-type", "application/json")
            .header(TIME_HEADER, now.to_string())
            .header(PROOF_HEADER, proof);
        self.read(request.send(&body))
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.admin)
    }

    fn agent(&self) -> ureq::Agent {
        ureq::Agent::config_builder()
            .timeout_global(Some(self.deadline))
            .http_status_as_error(false)
            .proxy(None)
            .build()
            .into()
    }

    fn read(
        &self,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Value, Failure> {
        let mut answer = answer.map_err(|error| {
            Failure::failed(format!(
                "no answer from the admin HTTP at {} ({error}); is a node running there, and is \
                 --admin right?",
                self.admin
            ))
        })?;
        let text = answer
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_string()
            .map_err(|error| Failure::failed(format!("half an answer: {error}")))?;
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|_| json!({ "error": text }));
        if answer.status().is_success() {
            return Ok(value);
        }
        let why = match value["error"].as_str() {
            Some("") | None => format!("the node answers {}; is it older?", answer.status()),
            Some(why) => why.to_owned(),
        };
        Err(Failure::failed(why))
    }
}

//! Changing a node's devices over the admin HTTP.
//!
//! ```text
//!   POST /v1/devices
//!   x-kvar-time:  seconds since 1970
//!   x-kvar-proof: 64 hex digits, of the namespace key over time and body
//!   { "action": "add",     "path": "/dev/nvme2n1", "size": null, "erase": false, "tier": null }
//!   { "action": "retire",  "device": "2", "now": false, "rate": null }   slot, uuid or path
//!   { "action": "replace", "device": "2", "path": "/dev/nvme3n1", "size": null, "erase": false }
//!
//!   200 the device as the list shows it    403 no proof    409 refused, and why    503 stopping
//! ```
//!
//! The authority is that of a purge: holding the namespace key. The key itself never travels; the
//! proof is bound to the body and to the time, so that what was overheard cannot be used for
//! anything else or later. A page in somebody's browser has no proof to send.
//!
//! What must always be true: only from this machine, even where the admin HTTP listens beyond it;
//! an answer comes when the change is over (of a device that leaves: when that has begun), and a caller that goes away does not undo it.

use crate::admin::Door;
use crate::config::DeviceTier;
use crate::devices::{Command, Event, NewDevice};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use kvar_base::NamespaceKey;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// How far the clocks of caller and node may be apart; they are the same machine's.
const PROOF_SECONDS_MAX: u64 = 60;

/// Header with the time of a proof.
pub const TIME_HEADER: &str = "x-kvar-time";
/// Header with the proof.
pub const PROOF_HEADER: &str = "x-kvar-proof";

/// Where the door is.
pub(crate) const PATH: &str = "/v1/devices";

/// The proof that goes with a body sent to one of the admin HTTP's doors, in hexadecimal digits.
#[must_use]
pub fn proof(key: &NamespaceKey, path: &str, unix_seconds: u64, body: &[u8]) -> String {
    let proof = key.prove(&challenge(path, unix_seconds, body));
    proof.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn challenge(path: &str, unix_seconds: u64, body: &[u8]) -> Vec<u8> {
    let mut challenge = format!("kvar admin 1 POST {path}\0").into_bytes();
    challenge.extend_from_slice(&unix_seconds.to_le_bytes());
    challenge.extend_from_slice(body);
    challenge
}

#[derive(Deserialize)]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
enum Change {
    Add {
        path: PathBuf,
        #[serde(default)]
        size: Option<u64>,
        #[serde(default)]
        erase: bool,
        #[serde(default)]
        tier: Option<DeviceTier>,
    },
    Retire {
        device: String,
        #[serde(default)]
        now: bool,
        #[serde(default)]
        rate: Option<u64>,
    },
    Replace {
        device: String,
        path: PathBuf,
        #[serde(default)]
        size: Option<u64>,
        #[serde(default)]
        erase: bool,
    },
}

impl From<Change> for Command {
    fn from(change: Change) -> Self {
        match change {
            Change::Add {
                path,
                size,
                erase,
                tier,
            } => Self::Add(NewDevice {
                path,
                size,
                erase,
                tier,
            }),
            Change::Retire { device, now, rate } => Self::Retire { device, now, rate },
            Change::Replace {
                device,
                path,
                size,
                erase,
            } => Self::Replace {
                device,
                new: NewDevice {
                    path,
                    size,
                    erase,
                    tier: None,
                },
            },
        }
    }
}

pub(crate) fn refuse(code: StatusCode, why: &str) -> Response {
    (code, Json(serde_json::json!({ "error": why }))).into_response()
}

fn is_proved(key: &NamespaceKey, path: &str, headers: &HeaderMap, body: &[u8]) -> bool {
    let word = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let (Some(time), Some(proof)) = (word(TIME_HEADER), word(PROOF_HEADER)) else {
        return false;
    };
    // A proof has the form of a key: 64 digits.
    let (Ok(time), Ok(proof)) = (time.parse::<u64>(), proof.parse::<kvar_base::BlockId>()) else {
        return false;
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |elapsed| elapsed.as_secs());
    now.abs_diff(time) <= PROOF_SECONDS_MAX
        && key.verify(&challenge(path, time, body), proof.as_bytes())
}

/// What a body asks to change, if that may come in: from this machine, from one who has the key, and
/// now. `why_not` is for everybody else.
pub(crate) fn admit<T: DeserializeOwned>(
    key: &NamespaceKey,
    peer: SocketAddr,
    path: &str,
    headers: &HeaderMap,
    body: &[u8],
    why_not: &str,
) -> Result<T, (StatusCode, String)> {
    if !peer.ip().is_loopback() || !is_proved(key, path, headers, body) {
        return Err((StatusCode::FORBIDDEN, why_not.to_owned()));
    }
    serde_json::from_slice(body)
        .map_err(|error| (StatusCode::BAD_REQUEST, format!("the body: {error}")))
}

/// The handler.
pub(crate) async fn change(
    State(door): State<Door>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let why_not = "devices are changed from the node's own machine, with the namespace key (kvar \
                   device --key-file) and a right clock";
    let change: Change = match admit(&door.key, peer, PATH, &headers, &body, why_not) {
        Ok(change) => change,
        Err((code, why)) => return refuse(code, &why),
    };
    let (reply, answer) = tokio::sync::oneshot::channel();
    let sent = door.keeper.send(Event::Command(change.into(), reply));
    match (sent, answer.await) {
        (Ok(()), Ok(Ok(device))) => Json(device).into_response(),
        (Ok(()), Ok(Err(why))) => refuse(StatusCode::CONFLICT, &why),
        _ => refuse(StatusCode::SERVICE_UNAVAILABLE, "the node is stopping"),
    }
}

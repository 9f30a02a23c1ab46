//! Switching the modes of a node's namespaces over the admin HTTP.
//!
//! ```text
//!   GET  /v1/modes      what holds: [ { "namespace": null, "mode": "load", "set_by": "settings" }, ... ]
//!   POST /v1/modes      the same, once it is on disk and on its way to every client
//!   x-kvar-time, x-kvar-proof: as for devices, over this path
//!   { "mode": "observe", "namespace": "team-a" }     one      { "mode": "off" }    all without their own
//!   { "mode": null, "namespace": "team-a" }          as all the others again
//!
//!   403 no proof    404 no such namespace    400 no such mode    500 the table cannot be written
//! ```
//!
//! What must always be true: as in `device_door`, only with the key and only from this machine.

use crate::admin::Door;
use crate::device_door::{admit, refuse};
use crate::mail::Mail;
use crate::modes::ModeError;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use kvar_base::Mode;
use serde::Deserialize;
use std::net::SocketAddr;

/// Where the door is.
pub(crate) const PATH: &str = "/v1/modes";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    /// Not given is not null: a body that forgets it must not forget a switch.
    #[serde(deserialize_with = "Option::deserialize")]
    mode: Option<Mode>,
    #[serde(default)]
    namespace: Option<String>,
}

/// What holds.
pub(crate) async fn list(State(door): State<Door>) -> Response {
    Json(door.modes.report()).into_response()
}

/// The handler.
pub(crate) async fn change(
    State(door): State<Door>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let why_not = "modes are switched from the node's own machine, with the namespace key (kvar mode \
                   --key-file) and a right clock";
    let Change { mode, namespace } = match admit(&door.key, peer, PATH, &headers, &body, why_not) {
        Ok(change) => change,
        Err((code, why)) => return refuse(code, &why),
    };
    let modes = door.modes.clone();
    let switched = {
        let namespace = namespace.clone();
        // A disk may be slow, and probes are answered meanwhile.
        tokio::task::spawn_blocking(move || modes.switch(namespace.as_deref(), mode)).await
    };
    match switched {
        Ok(Ok(())) => {}
        Ok(Err(error @ ModeError::Namespace { .. })) => {
            return refuse(StatusCode::NOT_FOUND, &error.to_string());
        }
        Ok(Err(error)) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        Err(_) => return refuse(StatusCode::SERVICE_UNAVAILABLE, "the node is stopping"),
    }
    let of = namespace.as_deref().unwrap_or("all");
    let word = mode.map_or("forgotten", Mode::word);
    tracing::info!(namespace = of, mode = word, "the mode was switched");
    door.post.send_all(|| Mail::Modes);
    Json(door.modes.report()).into_response()
}

//! The admin HTTP: how a node is, for people, probes and Prometheus.
//!
//! | path | answer |
//! |---|---|
//! | `/livez` | 200 while the process runs |
//! | `/readyz` | 200 when it serves; 503 while it loads (with how far it is) and while it stops |
//! | `/metrics` | OpenMetrics text |
//! | `/v1/status` | one JSON object |
//! | `/v1/devices` | the devices, as `kvar device list` prints them |
//! | `POST /v1/devices` | `device_door`: a device comes in, goes, is replaced |
//! | `/v1/modes` | how much of the store engines use |
//! | `POST /v1/modes` | `mode_door`: that is switched |
//!
//! What must always be true: the data plane never waits for this thread. It asks the threads by
//! mail, they answer between two turns, and one that does not answer within [`ANSWER_WAIT`] is left
//! out and counted.

use crate::device_door;
use crate::devices::{Event, Phase};
use crate::mail::{Mail, Post};
use crate::metrics;
use crate::mode_door;
use crate::modes::Modes;
use crate::node::StatusSource;
use crate::report::ThreadReport;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Router, routing::get};
use crossbeam_channel::Sender;
use kvar_base::NamespaceKey;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How long a thread may take to say how it is. One turn is a few milliseconds.
const ANSWER_WAIT: Duration = Duration::from_secs(1);

/// Why there is no admin HTTP.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The address.
    #[error(
        "the admin HTTP cannot listen on {address} ({source}): stop what has it, or choose another \
         with --admin (port 0 takes any free one)"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
    /// Its thread.
    #[error("the system refuses the admin thread: {0}")]
    Thread(std::io::Error),
}

/// An address that is taken and not served yet.
pub(crate) struct AdminSocket {
    pub(crate) address: SocketAddr,
    listener: TcpListener,
}

/// The running admin HTTP.
pub(crate) struct Admin {
    thread: JoinHandle<()>,
    stop: oneshot::Sender<()>,
}

/// What the doors lead to.
#[derive(Clone)]
pub(crate) struct Door {
    pub(crate) status: Arc<StatusSource>,
    pub(crate) post: Post,
    pub(crate) keeper: Sender<Event>,
    pub(crate) modes: Arc<Modes>,
    /// Who has it may change things.
    pub(crate) key: NamespaceKey,
}

/// Takes the address.
pub(crate) fn bind(address: SocketAddr) -> Result<AdminSocket, AdminError> {
    let wrong = |source| AdminError::Bind { address, source };
    let listener = TcpListener::bind(address).map_err(wrong)?;
    listener.set_nonblocking(true).map_err(wrong)?;
    let address = listener.local_addr().map_err(wrong)?;
    Ok(AdminSocket { address, listener })
}

impl AdminSocket {
    /// Serves on a thread of its own.
    pub(crate) fn serve(self, door: Door) -> Result<Admin, AdminError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(AdminError::Thread)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let router = Router::new()
            .route("/livez", get(|| async { "live\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics_page))
            .route("/v1/status", get(status_page))
            .route(
                device_door::PATH,
                get(devices_page).post(device_door::change),
            )
            .route(
                mode_door::PATH,
                get(mode_door::list).post(mode_door::change),
            )
            .with_state(door);
        let body = move || {
            runtime.block_on(async move {
                let listener = match tokio::net::TcpListener::from_std(self.listener) {
                    Ok(listener) => listener,
                    Err(error) => {
                        tracing::error!(%error, "the admin HTTP ends");
                        return;
                    }
                };
                tokio::select! {
                    served = axum::serve(
                        listener,
                        router.into_make_service_with_connect_info::<SocketAddr>(),
                    ) => {
                        if let Err(error) = served {
                            tracing::error!(%error, "the admin HTTP ends");
                        }
                    }
                    // A handle that is gone is a stop as well.
                    _ = stopped => {}
                }
            });
        };
        let spawn = std::thread::Builder::new().name("kvar-admin".to_owned());
        let thread = spawn.spawn(body).map_err(AdminError::Thread)?;
        Ok(Admin { thread, stop })
    }
}

impl Admin {
    /// Ends it, requests under way included.
    pub(crate) fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

/// Asks every thread; those that do not answer in time are missing.
async fn reports(post: &Post) -> Vec<ThreadReport> {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    for thread in 0..post.threads() {
        let sender = sender.clone();
        let taker = Box::new(move |report| drop(sender.send(report)));
        post.send(thread, Mail::Report(taker));
    }
    drop(sender);
    let mut reports: Vec<ThreadReport> = Vec::new();
    let all = async {
        while let Some(report) = receiver.recv().await {
            reports.push(report);
        }
    };
    let _ = tokio::time::timeout(ANSWER_WAIT, all).await;
    reports
}

async fn readyz(State(door): State<Door>) -> Response {
    let view = door.status.views.latest();
    let text = match view.phase {
        Phase::Serving => return "ready\n".into_response(),
        Phase::Stopping => "stopping\n".to_owned(),
        Phase::Loading => {
            let report = door.status.report(reports(&door.post).await);
            format!(
                "loading: {} of {} shards loaded, {} bytes read for the others\n",
                view.shards_loaded, view.shards, report.loading_bytes
            )
        }
    };
    (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
}

async fn status_page(State(door): State<Door>) -> Response {
    let json = door.status.report(reports(&door.post).await).to_json();
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}

async fn devices_page(State(door): State<Door>) -> Response {
    let report = door.status.report(reports(&door.post).await);
    axum::Json(report.devices).into_response()
}

async fn metrics_page(State(door): State<Door>) -> Response {
    match metrics::page(&door.status.report(reports(&door.post).await)) {
        Ok(page) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

//! The admin HTTP: how a node is, for people, probes and Prometheus.
//!
//! | path | answer |
//! |---|---|
//! | `/livez` | 200 while the process runs |
//! | `/readyz` | 200 when it serves, 503 before and after |
//! | `/metrics` | OpenMetrics text |
//! | `/v1/status` | one JSON object |
//!
//! What must always be true: the data plane never waits for this thread. It asks the shards by
//! mail, they answer between two turns, and one that does not answer within [`ANSWER_WAIT`] is left
//! out and counted.

use crate::mail::{Mail, Post};
use crate::metrics;
use crate::node::StatusSource;
use crate::report::ShardReport;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Router, routing::get};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How long a shard may take to say how it is. One turn is a few milliseconds.
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

#[derive(Clone)]
struct Shared {
    status: Arc<StatusSource>,
    post: Post,
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
    pub(crate) fn serve(self, status: Arc<StatusSource>, post: Post) -> Result<Admin, AdminError> {
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
            .with_state(Shared { status, post });
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
                    served = axum::serve(listener, router) => {
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

/// Asks every shard; those that do not answer in time are missing.
async fn reports(post: &Post) -> Vec<ShardReport> {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    for shard in 0..post.shards() {
        let sender = sender.clone();
        let taker = Box::new(move |report| drop(sender.send(report)));
        post.send(shard, Mail::Report(taker));
    }
    drop(sender);
    let mut reports: Vec<ShardReport> = Vec::new();
    let all = async {
        while let Some(report) = receiver.recv().await {
            reports.push(report);
        }
    };
    let _ = tokio::time::timeout(ANSWER_WAIT, all).await;
    reports.sort_by_key(|report| report.engine.shard);
    reports
}

async fn readyz(State(shared): State<Shared>) -> Response {
    if shared.status.ready.load(Ordering::Relaxed) {
        "ready\n".into_response()
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "not ready: recovering or stopping\n",
        )
            .into_response()
    }
}

async fn status_page(State(shared): State<Shared>) -> Response {
    let reports = reports(&shared.post).await;
    let json = shared.status.report(&reports).to_json();
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}

async fn metrics_page(State(shared): State<Shared>) -> Response {
    let reports = reports(&shared.post).await;
    match metrics::page(&shared.status.report(&reports), shared.post.shards()) {
        Ok(page) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

//! The objects that a cluster cannot do without, made and kept right by the server itself.

use std::sync::Arc;

use crate::server::Server;

/// Runs until the server shuts down.
pub async fn run(server: Arc<Server>) {
    server.shutdown.cancelled().await;
}

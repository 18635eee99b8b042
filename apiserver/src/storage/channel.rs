//! The connection to etcd, with more on its way at a time than HTTP/2's 64 KiB: filling the caches reads everything,
//! and would wait for a round trip after each such piece.

use etcd_client::{BalancedChannelBuilder, Channel};
use tokio::sync::mpsc;
use tonic::transport::channel::Change;
use tonic::transport::{Endpoint, Uri};

const STREAM_WINDOW: u32 = 4 << 20;
/// Watches and requests share the connection with what fills the caches.
const CONNECTION_WINDOW: u32 = 2 * STREAM_WINDOW;

/// A channel balanced over etcd's members.
pub struct WideWindows;

impl BalancedChannelBuilder for WideWindows {
    type Error = tonic::transport::Error;

    fn balanced_channel(self, size: usize) -> Result<(Channel, mpsc::Sender<Change<Uri, Endpoint>>), Self::Error> {
        let (channel, wide) = tonic::transport::Channel::balance_channel(size);
        let (endpoints, mut plain) = mpsc::channel(size);
        tokio::spawn(async move {
            while let Some(change) = plain.recv().await {
                let change = match change {
                    Change::Insert(uri, endpoint) => Change::Insert(uri, widen(endpoint)),
                    removal => removal,
                };
                // The channel ends with its last user.
                if wide.send(change).await.is_err() {
                    return;
                }
            }
        });
        Ok((Channel::Tonic(channel), endpoints))
    }
}

fn widen(endpoint: Endpoint) -> Endpoint {
    endpoint.initial_stream_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW)
}

//! Events sent to a webhook in batches, beside the requests: a webhook that does not keep up loses events, and never
//! holds a request.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::Backend;
use crate::auth::kubeconfig::Webhook;
use crate::config::Config;
use crate::http::json_client::with_retries;
use crate::registry::object::ObjectExt;

pub const TIMEOUT: Duration = Duration::from_secs(30);

pub struct Batches {
    events: mpsc::Sender<Value>,
}

#[derive(Clone, Copy)]
struct Limits {
    size: usize,
    wait: Duration,
}

impl Batches {
    pub fn start(webhook: Webhook, config: &Config) -> Self {
        let (events, queue) = mpsc::channel(config.audit_webhook_batch_buffer_size.max(1));
        let limits =
            Limits { size: config.audit_webhook_batch_max_size.max(1), wait: config.audit_webhook_batch_max_wait };
        tokio::spawn(send(webhook, queue, limits));
        Self { events }
    }
}

impl Backend for Batches {
    fn keep(&self, event: &Value, _line: &str) {
        if self.events.try_send(event.clone()).is_err() {
            tracing::warn!(id = event.str_at(&["auditID"]), "an audit event is lost: the webhook does not keep up");
        }
    }
}

/// Until the server is gone.
async fn send(webhook: Webhook, mut queue: mpsc::Receiver<Value>, limits: Limits) {
    while let Some(first) = queue.recv().await {
        let mut batch = vec![first];
        let until = Instant::now() + limits.wait;
        while batch.len() < limits.size {
            match timeout_at(until, queue.recv()).await {
                Ok(Some(event)) => batch.push(event),
                Ok(None) | Err(_) => break,
            }
        }
        let count = batch.len();
        let list = json!({"kind": "EventList", "apiVersion": "audit.k8s.io/v1", "metadata": {}, "items": batch});
        if let Err(error) = with_retries(|| webhook.client.post(&webhook.url, &list)).await {
            let error = apimachinery::process::error_chain(&error);
            tracing::error!(error, count, "audit events are lost: the webhook does not take them");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::JsonPeer;

    #[tokio::test]
    async fn events_come_in_batches() {
        let peer = JsonPeer::start(|_, _| (200, Value::Null)).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hook");
        std::fs::write(&path, peer.kubeconfig()).unwrap();
        let mut config = Config::for_etcd("http://127.0.0.1:1");
        config.audit_webhook_batch_max_size = 2;
        config.audit_webhook_batch_max_wait = Duration::from_millis(20);
        let batches = Batches::start(Webhook::read(&path, TIMEOUT).unwrap(), &config);
        for number in 0..3 {
            batches.keep(&json!({"auditID": number}), "");
        }
        let sizes = apimachinery::testing::eventually("both batches", Duration::from_secs(5), || async {
            let sizes: Vec<usize> = peer.asked().iter().map(|(_, list)| list.list_at(&["items"]).len()).collect();
            if sizes.iter().sum::<usize>() == 3 { Ok(sizes) } else { Err(format!("{sizes:?}")) }
        });
        assert_eq!(sizes.await, [2, 1]);
    }
}

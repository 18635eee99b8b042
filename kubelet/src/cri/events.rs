//! containerd's own event stream: tells which container or sandbox has changed, so that nothing needs polling. After
//! an interruption the listener is told that anything may have happened.

use std::time::Duration;

use containerd_client::events as containerd;
use containerd_client::services::v1::SubscribeRequest;
use containerd_client::services::v1::events_client::EventsClient;
use prost::Message;
use tokio::sync::mpsc;
use tonic::transport::Channel;

/// One thing that happened in the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuntimeEvent {
    /// The first process of this container or sandbox has ended.
    Exited(String),
    /// Started, or killed for lack of memory.
    Changed(String),
    /// Events may have been missed.
    Resync,
}

/// Follows the events until the receiver is gone, connecting again for ever.
pub async fn follow(channel: Channel, events: mpsc::Sender<RuntimeEvent>) {
    let mut delay = Duration::from_millis(200);
    loop {
        let filters = vec!["namespace==k8s.io,topic~=\"^/tasks/(exit|start|oom|delete)\"".to_owned()];
        match EventsClient::new(channel.clone()).subscribe(SubscribeRequest { filters }).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                delay = Duration::from_millis(200);
                if events.send(RuntimeEvent::Resync).await.is_err() {
                    return;
                }
                while let Ok(Some(envelope)) = stream.message().await {
                    let event = envelope.event.as_ref().and_then(|any| decode(&envelope.topic, &any.value));
                    let Some(event) = event else { continue };
                    if events.send(event).await.is_err() {
                        return;
                    }
                }
                tracing::warn!("the container runtime's event stream ended");
            }
            Err(error) => tracing::debug!(%error, "cannot follow the container runtime's events"),
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(Duration::from_secs(5));
    }
}

fn decode(topic: &str, bytes: &[u8]) -> Option<RuntimeEvent> {
    match topic {
        "/tasks/exit" => {
            let exit = containerd::TaskExit::decode(bytes).ok()?;
            // Commands run by exec end under their own id.
            (exit.id == exit.container_id).then_some(RuntimeEvent::Exited(exit.container_id))
        }
        "/tasks/delete" => {
            let gone = containerd::TaskDelete::decode(bytes).ok()?;
            (gone.id.is_empty() || gone.id == gone.container_id).then_some(RuntimeEvent::Exited(gone.container_id))
        }
        "/tasks/start" => Some(RuntimeEvent::Changed(containerd::TaskStart::decode(bytes).ok()?.container_id)),
        "/tasks/oom" => Some(RuntimeEvent::Changed(containerd::TaskOom::decode(bytes).ok()?.container_id)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_first_processes_count() {
        let exit = |id: &str| {
            let event = containerd::TaskExit { container_id: "c".into(), id: id.into(), ..Default::default() };
            decode("/tasks/exit", &event.encode_to_vec())
        };
        assert_eq!(exit("c"), Some(RuntimeEvent::Exited("c".into())));
        assert_eq!(exit("exec-1"), None);
        assert_eq!(decode("/tasks/exit", &[0xff]), None);
        assert_eq!(decode("/images/create", &[]), None);
    }
}

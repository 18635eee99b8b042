//! A machine that goes down, with a logind in this process.

use std::io::Read;

use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::PodSpec;
use parking_lot::Mutex;
use serde_json::json;

use super::*;
use crate::config::KubeletConfiguration;
use crate::cri::Runtime;
use crate::pod::observed::{self, RuntimePod};
use crate::state::PodView;
use crate::testing::FakeApi;

const PATIENCE: Duration = Duration::from_secs(30);

/// Hands out one end of a pipe as each lock: the other end tells when the lock is closed.
struct FakeLogind {
    locks: Mutex<Vec<std::io::PipeReader>>,
    allowed: Mutex<Vec<Duration>>,
    announcements: Mutex<Option<mpsc::UnboundedReceiver<bool>>>,
}

#[async_trait::async_trait]
impl Logind for FakeLogind {
    async fn longest_delay(&self) -> Result<Duration, LogindError> {
        Ok(Duration::from_secs(5))
    }

    async fn allow_delay(&self, delay: Duration) -> Result<(), LogindError> {
        self.allowed.lock().push(delay);
        Ok(())
    }

    async fn delay_shutdown(&self) -> Result<OwnedFd, LogindError> {
        let (reader, writer) = std::io::pipe().unwrap();
        self.locks.lock().push(reader);
        Ok(writer.into())
    }

    async fn announcements(&self) -> Result<BoxStream<'static, bool>, LogindError> {
        let receiver = self.announcements.lock().take();
        let receiver = receiver.ok_or(LogindError { step: "listen", why: "once only".to_owned() })?;
        Ok(futures::stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) }).boxed())
    }
}

struct Given(Arc<FakeLogind>);

#[async_trait::async_trait]
impl Connect for Given {
    async fn connect(&self) -> Result<Arc<dyn Logind>, LogindError> {
        Ok(self.0.clone())
    }
}

fn view(name: &str, priority: i32, runs: bool) -> PodView {
    let mut pod = Pod { spec: Some(PodSpec { priority: Some(priority), ..PodSpec::default() }), ..Pod::default() };
    pod.metadata.name = Some(name.to_owned());
    pod.metadata.uid = Some(name.to_owned());
    let state = if runs { cri::ContainerState::ContainerRunning } else { cri::ContainerState::ContainerExited };
    let status = cri::ContainerStatus { state: state as i32, ..cri::ContainerStatus::default() };
    let containers = vec![observed::container(status, String::new())];
    let observed = RuntimePod { containers, ..RuntimePod::default() };
    PodView { pod: Arc::new(pod), observed: Arc::new(observed) }
}

#[tokio::test]
async fn pods_end_before_the_machine_goes_down() {
    let root = tempfile::tempdir().unwrap();
    let periods = json!([{"priority": 0, "shutdownGracePeriodSeconds": 20},
        {"priority": 1000, "shutdownGracePeriodSeconds": 10}]);
    let config = json!({"shutdownGracePeriodByPodPriority": periods});
    let config: KubeletConfiguration = serde_json::from_value(config).unwrap();
    let client = FakeApi::default().client();
    let runtime = Runtime::new("/nowhere".as_ref());
    let state = Arc::new(NodeState::new("n".into(), Arc::new(config), client.clone(), runtime, root.path().to_owned()));
    state.publish("low", view("low", 5, true));
    state.publish("high", view("high", 2000, true));
    let readiness = Arc::new(Readiness::default());
    let (evictions, mut ended) = mpsc::channel(16);
    let (announce, announcements) = mpsc::unbounded_channel();
    let logind = Arc::new(FakeLogind {
        locks: Mutex::default(),
        allowed: Mutex::default(),
        announcements: Mutex::new(Some(announcements)),
    });
    let recorder = Recorder::start(client, "n");
    let shutdown = Shutdown { state: state.clone(), readiness: readiness.clone(), recorder, evictions };
    let running = tokio::spawn(shutdown.run(Given(logind.clone())));

    announce.send(true).unwrap();
    let next = tokio::time::timeout(PATIENCE, ended.recv()).await.expect("a pod ends").unwrap();
    assert_eq!((next.0.as_str(), next.1.reason, next.1.grace), ("low", "Terminated", Some(20)));
    assert_eq!(readiness.changes().borrow()[&Obstacle::Shutdown], "node is shutting down");
    assert_eq!(*logind.allowed.lock(), [Duration::from_secs(30)]);
    // The next group waits for the containers and the volumes of this one.
    let volumes = root.path().join("pods/low/volumes");
    std::fs::create_dir_all(&volumes).unwrap();
    state.publish("low", view("low", 5, false));
    assert!(ended.try_recv().is_err());
    std::fs::remove_dir(&volumes).unwrap();
    state.publish("low", view("low", 5, false));
    let next = tokio::time::timeout(PATIENCE, ended.recv()).await.expect("another pod ends").unwrap();
    assert_eq!((next.0.as_str(), next.1.grace), ("high", Some(10)));
    state.publish("high", view("high", 2000, false));

    let mut lock = logind.locks.lock().remove(0);
    let released = tokio::task::spawn_blocking(move || lock.read(&mut [0]).map_err(|error| error.kind()));
    let released = tokio::time::timeout(PATIENCE, released).await.expect("the lock is let go").unwrap();
    assert_eq!(released, Ok(0));

    // Called off: pods may come again, and the next shutdown waits again.
    announce.send(false).unwrap();
    let mut changes = readiness.changes();
    let cleared = tokio::time::timeout(PATIENCE, changes.wait_for(|obstacles| obstacles.is_empty())).await;
    assert!(cleared.is_ok_and(|waited| waited.is_ok()));
    running.abort();
}

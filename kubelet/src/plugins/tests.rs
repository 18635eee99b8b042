use parking_lot::Mutex;
use tokio::sync::watch;

use super::api::{GET_INFO, InfoRequest, NOTIFY, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use super::*;
use crate::grpc::Service;

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// A plugin's registration socket; what it is told is seen in `told`.
struct Fake {
    told: watch::Receiver<Vec<RegistrationStatus>>,
    end: CancellationToken,
}

impl Fake {
    fn start(socket: &Path, kind: &str, versions: &[&str]) -> Self {
        let info = PluginInfo {
            r#type: kind.to_owned(),
            name: "fake.example".to_owned(),
            endpoint: String::new(),
            supported_versions: versions.iter().map(|version| (*version).to_owned()).collect(),
        };
        let (sender, told) = watch::channel(Vec::new());
        let sender = Arc::new(sender);
        let end = CancellationToken::new();
        Service::default()
            .unary(GET_INFO, move |_: InfoRequest| std::future::ready(Ok(info.clone())))
            .unary(NOTIFY, move |status: RegistrationStatus| {
                sender.send_modify(|told| told.push(status));
                std::future::ready(Ok(RegistrationStatusResponse {}))
            })
            .start(socket, end.clone())
            .unwrap();
        Self { told, end }
    }

    async fn told(&mut self, test: impl Fn(&[RegistrationStatus]) -> bool) {
        let seen = tokio::time::timeout(PATIENCE, self.told.wait_for(|told| test(told))).await.map(|told| told.is_ok());
        assert!(seen == Ok(true), "the plugin was told {:?}", self.told.borrow());
    }
}

/// Notes what it is asked; refuses as often as it has been told to.
struct Recorder {
    calls: watch::Sender<Vec<String>>,
    refusals: Mutex<usize>,
}

impl Recorder {
    fn new(refusals: usize) -> Arc<Self> {
        Arc::new(Self { calls: watch::Sender::default(), refusals: Mutex::new(refusals) })
    }

    async fn called(&self, want: &[&str]) {
        let mut calls = self.calls.subscribe();
        let seen = tokio::time::timeout(PATIENCE, calls.wait_for(|calls| calls.as_slice() == want)).await;
        assert!(seen.is_ok(), "wanted {want:?}, seen {:?}", self.calls.borrow());
    }
}

#[async_trait]
impl Handler for Recorder {
    fn validate(&self, plugin: &Plugin) -> Result<(), Refusal> {
        if plugin.versions == ["1.0.0"] { Ok(()) } else { Err(Refusal("unknown version".to_owned())) }
    }

    async fn register(&self, plugin: &Plugin) -> Result<(), Refusal> {
        let mut refusals = self.refusals.lock();
        if *refusals > 0 {
            *refusals -= 1;
            return Err(Refusal("not yet".to_owned()));
        }
        self.calls.send_modify(|calls| calls.push(format!("+{}", plugin.name)));
        Ok(())
    }

    async fn deregister(&self, plugin: &Plugin) {
        self.calls.send_modify(|calls| calls.push(format!("-{}", plugin.name)));
    }
}

fn registrar(directory: &Path, handler: &Arc<Recorder>) -> JoinHandle<()> {
    let handlers = Handlers::from([("CSIPlugin", handler.clone() as Arc<dyn Handler>)]);
    tokio::spawn(Registrar::new(directory.to_owned(), handlers).run())
}

#[tokio::test]
async fn plugins_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let handler = Recorder::new(1);
    let running = registrar(directory.path(), &handler);
    // In a directory that is made after the watch began.
    let socket = directory.path().join("sub/fake.sock");
    let mut fake = Fake::start(&socket, "CSIPlugin", &["1.0.0"]);
    fake.told(|told| told.iter().any(|status| status.plugin_registered)).await;
    let first = fake.told.borrow()[0].clone();
    assert_eq!(first.error, "RegisterPlugin error -- plugin registration failed with err: not yet");
    handler.called(&["+fake.example"]).await;

    // Replaced by another of the same name.
    fake.end.cancel();
    let mut second = Fake::start(&socket, "CSIPlugin", &["1.0.0"]);
    second.told(|told| told.iter().any(|status| status.plugin_registered)).await;
    handler.called(&["+fake.example", "-fake.example", "+fake.example"]).await;

    std::fs::remove_file(&socket).unwrap();
    handler.called(&["+fake.example", "-fake.example", "+fake.example", "-fake.example"]).await;
    running.abort();
}

#[tokio::test]
async fn plugins_are_told_why_they_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let handler = Recorder::new(0);
    let (odd, old) = (directory.path().join("odd.sock"), directory.path().join("old.sock"));
    let mut unknown = Fake::start(&odd, "OddPlugin", &[]);
    let mut outdated = Fake::start(&old, "CSIPlugin", &["0.1.0"]);
    let _hidden = Fake::start(&directory.path().join(".hidden.sock"), "CSIPlugin", &["1.0.0"]);
    let running = registrar(directory.path(), &handler);
    let says = |want: String| move |told: &[RegistrationStatus]| told.iter().any(|status| status.error == want);
    let no_handler = "RegisterPlugin error -- no handler registered for plugin type: OddPlugin at socket";
    unknown.told(says(format!("{no_handler} {}", odd.display()))).await;
    let invalid = "RegisterPlugin error -- plugin validation failed with err: unknown version";
    outdated.told(says(invalid.to_owned())).await;
    handler.called(&[]).await;
    running.abort();
}

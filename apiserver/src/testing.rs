//! What tests of this crate start: an etcd of their own, and a whole server on it, both gone when dropped. Nothing in
//! the server itself uses it.

mod json_peer;

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::CancellationToken;

pub use json_peer::{JsonPeer, nowhere};

use crate::config::Config;
use crate::http::listener::Listener;
use crate::server::Server;
use crate::storage::Store;
use crate::storage::etcd::Etcd;

/// The token of a user in `system:masters` on a `TestServer`.
pub const ADMIN_TOKEN: &str = "test-admin";

/// A directory that is deleted with the value.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("kube-apiserver-test-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("cannot delete {}: {error}", self.0.display());
        }
    }
}

/// An etcd of one member.
pub struct TestEtcd {
    process: Child,
    pub endpoint: String,
    _data: Scratch,
}

impl TestEtcd {
    /// `None`, with a word on standard error, when there is no etcd on this machine.
    pub fn start() -> std::io::Result<Option<Self>> {
        let data = Scratch::new()?;
        let (client, peer) = (free_address()?, free_address()?);
        let (endpoint, peer) = (format!("http://{client}"), format!("http://{peer}"));
        let spawned = Command::new("etcd")
            .args(["--name", "test", "--unsafe-no-fsync", "--data-dir"])
            .arg(data.path())
            .args(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("test={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match spawned {
            Ok(process) => Ok(Some(Self { process, endpoint, _data: data })),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: this test needs etcd in PATH");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// A connection, once etcd answers.
    pub async fn store(&self) -> Result<Arc<dyn Store>, crate::storage::StoreError> {
        let store = Etcd::connect(&Config::for_etcd(&self.endpoint)).await?;
        let mut tries = 0;
        loop {
            match store.revision().await {
                Ok(_) => return Ok(Arc::new(store)),
                Err(error) if tries == 100 => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
            tries += 1;
        }
    }
}

impl Drop for TestEtcd {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("cannot end etcd: {error}");
        }
    }
}

fn free_address() -> std::io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

/// A server that listens on a port of its own and lets `ADMIN_TOKEN` do everything.
pub struct TestServer {
    pub server: Arc<Server>,
    pub address: SocketAddr,
    /// The certificate to trust, PEM.
    pub certificate: PathBuf,
    _scratch: Scratch,
}

impl TestServer {
    pub async fn start(store: Arc<dyn Store>) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Self::start_with(store, |_| {}).await
    }

    /// With other flags than the usual ones.
    pub async fn start_with(
        store: Arc<dyn Store>,
        change: impl FnOnce(&mut Config),
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        apimachinery::process::install_crypto_provider();
        let scratch = Scratch::new()?;
        let tokens = scratch.path().join("tokens.csv");
        std::fs::write(&tokens, format!("{ADMIN_TOKEN},admin,admin,system:masters\n"))?;
        let mut config = Config::for_etcd("http://127.0.0.1:1");
        config.bind_address = [127, 0, 0, 1].into();
        config.secure_port = 0;
        config.cert_dir = scratch.path().to_owned();
        config.token_auth_file = Some(tokens);
        config.authorization_mode = vec!["RBAC".into()];
        config.disable_admission_plugins = vec!["ServiceAccount".into()];
        change(&mut config);
        let listener = Listener::bind(&config).await?;
        let address = listener.local_addr()?;
        let certificate = config.cert_dir.join("apiserver.crt");
        let server = Server::start(config, store, CancellationToken::new())?;
        tokio::spawn(crate::extensions::run(server.clone()));
        tokio::spawn(listener.serve(server.clone()));
        server.caches.wait_for(1).await;
        Ok(Self { server, address, certificate, _scratch: scratch })
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.server.shutdown.cancel();
    }
}

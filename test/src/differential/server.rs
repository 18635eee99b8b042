//! An API server with an etcd of its own, on loopback ports, with keys made for this run; gone when dropped. The same
//! flags go to ours and to upstream's.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rustls::pki_types::CertificateDer;
use tempfile::TempDir;

use super::client::{Client, Request};
use super::{Error, Result, chain};
use crate::Running;

/// The range of cluster addresses; answers are freed of what was picked from it.
pub const SERVICE_RANGE: &str = "10.77.0.0/16";
const READY_SECONDS: u64 = 120;
const POLL: Duration = Duration::from_millis(50);

/// Who asks: name and token. The first may do everything, the second is in no group.
pub const USERS: [(&str, &str, &str); 2] =
    [("admin", "token-of-admin", "system:masters"), ("guest", "token-of-guest", "")];

/// The programs under test.
pub struct Programs {
    pub ours: PathBuf,
    pub upstream: PathBuf,
    pub etcd: PathBuf,
}

impl Programs {
    /// `KETCH_APISERVER` is our kube-apiserver, `KETCH_UPSTREAM` a folder with upstream's and perhaps an etcd.
    pub fn from_env() -> Result<Self> {
        let setting = |name| std::env::var(name).map(PathBuf::from).map_err(|_| Error::Setting(name));
        let upstream = setting("KETCH_UPSTREAM")?;
        let etcd = upstream.join("etcd");
        let etcd = if etcd.exists() { etcd } else { "etcd".into() };
        Ok(Self { ours: setting("KETCH_APISERVER")?, upstream: upstream.join("kube-apiserver"), etcd })
    }
}

/// Keys, certificates and users, in a folder that lives as long as this.
pub struct Keys {
    dir: TempDir,
    authority: CertificateDer<'static>,
    /// Where the servers' logs go.
    logs: PathBuf,
}

impl Keys {
    pub fn make(logs: &Path) -> Result<Self> {
        let dir = tempfile::tempdir().map_err(|source| Error::File { path: std::env::temp_dir(), source })?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(rcgen::DnType::CommonName, "differential-ca");
        let authority = params.self_signed(&key)?;
        let issuer = Issuer::new(params, key);

        let serving_key = KeyPair::generate()?;
        let mut serving = CertificateParams::new(vec!["localhost".to_owned()])?;
        serving.subject_alt_names.push(SanType::IpAddress(Ipv4Addr::LOCALHOST.into()));
        let serving = serving.signed_by(&serving_key, &issuer)?;
        let account_key = KeyPair::generate()?;

        let users: String =
            USERS.map(|(name, token, group)| format!("{token},{name},{name}-uid,\"{group}\"\n")).concat();
        for (name, text) in [
            ("ca.crt", authority.pem()),
            ("serving.crt", serving.pem()),
            ("serving.key", serving_key.serialize_pem()),
            ("accounts.key", account_key.serialize_pem()),
            ("accounts.pub", account_key.public_key_pem()),
            ("users.csv", users),
        ] {
            let path = dir.path().join(name);
            fs::write(&path, text).map_err(|source| Error::File { path, source })?;
        }
        fs::create_dir_all(logs).map_err(|source| Error::File { path: logs.into(), source })?;
        Ok(Self { dir, authority: authority.der().clone(), logs: logs.into() })
    }
}

fn free_port() -> Result<u16> {
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    address.map(|a| a.port()).map_err(|source| Error::File { path: "127.0.0.1:0".into(), source })
}

/// Starts a program whose output goes to `NAME.log` in the folder.
fn start(program: &Path, args: &[String], dir: &Path, name: &str) -> Result<Running> {
    let path = dir.join(format!("{name}.log"));
    let log = File::create(&path).and_then(|log| Ok((log.try_clone()?, log)));
    let (out, err) = log.map_err(|source| Error::File { path, source })?;
    let child = Command::new(program).args(args).stdin(Stdio::null()).stdout(out).stderr(err).spawn();
    child.map(Running).map_err(|source| Error::Start { program: program.into(), source })
}

/// A store in memory-backed files that go with it.
pub struct Etcd {
    _process: Running,
    _dir: TempDir,
    pub url: String,
}

impl Etcd {
    pub fn start(program: &Path) -> Result<Self> {
        let dir = tempfile::tempdir().map_err(|source| Error::File { path: std::env::temp_dir(), source })?;
        let (url, peer) = (format!("http://127.0.0.1:{}", free_port()?), format!("http://127.0.0.1:{}", free_port()?));
        let args = [
            format!("--data-dir={}", dir.path().join("data").display()),
            format!("--listen-client-urls={url}"),
            format!("--advertise-client-urls={url}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
            "--unsafe-no-fsync".into(),
            "--log-level=error".into(),
        ];
        Ok(Self { _process: start(program, &args, dir.path(), "etcd")?, _dir: dir, url })
    }
}

pub struct ApiServer {
    _process: Running,
    pub client: Client,
}

impl ApiServer {
    /// Starts the program and waits until it is ready. `name` is the log's.
    pub async fn start(program: &Path, name: &str, etcd: &Etcd, keys: &Keys) -> Result<Self> {
        let file = |name: &str| keys.dir.path().join(name).display().to_string();
        let port = free_port()?;
        let args = [
            format!("--etcd-servers={}", etcd.url),
            "--bind-address=127.0.0.1".into(),
            "--advertise-address=192.0.2.1".into(),
            format!("--secure-port={port}"),
            format!("--tls-cert-file={}", file("serving.crt")),
            format!("--tls-private-key-file={}", file("serving.key")),
            format!("--client-ca-file={}", file("ca.crt")),
            format!("--token-auth-file={}", file("users.csv")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", file("accounts.pub")),
            format!("--service-account-signing-key-file={}", file("accounts.key")),
            format!("--service-cluster-ip-range={SERVICE_RANGE}"),
            "--authorization-mode=Node,RBAC".into(),
            "--enable-admission-plugins=NodeRestriction".into(),
            "--allow-privileged=true".into(),
            "--enable-bootstrap-token-auth=true".into(),
        ];
        let process = start(program, &args, &keys.logs, name)?;
        let client = Client::new(format!("https://127.0.0.1:{port}"), keys.authority.clone(), USERS[0].1)?;
        let deadline = Instant::now() + Duration::from_secs(READY_SECONDS);
        loop {
            let last = match client.send(&Request::get("/readyz")).await {
                Ok(answer) if answer.status == 200 => return Ok(Self { _process: process, client }),
                Ok(answer) => format!("{} {}", answer.status, String::from_utf8_lossy(&answer.body)),
                Err(error) => chain(&error),
            };
            if Instant::now() >= deadline {
                let log = keys.logs.join(format!("{name}.log"));
                return Err(Error::NotReady { what: name.into(), seconds: READY_SECONDS, last, log });
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

//! The process: options in, leadership, then controllers until the end. It knows no controller but the table.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use apimachinery::controller::{Driver, EventApi, Informers, LeaderElectionError, Leadership, Recorder, Rest};
use apimachinery::process::{CancellationToken, ClientError, HealthChecks, SecureServingError, hostname};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};

use crate::common::name;
use crate::controllers::{self, ALL};
use crate::options::Options;

/// The default of `--secure-port`.
const PORT: u16 = 10257;

/// What starting a controller needs.
pub struct Context {
    pub driver: Driver,
    pub options: Options,
    /// The contents of `--root-ca-file`.
    pub root_ca: Option<String>,
    /// The contents of `--service-account-private-key-file`.
    pub service_account_key: Option<String>,
    /// The contents of `--cluster-signing-cert-file` and `--cluster-signing-key-file`.
    pub signing_certificate: Option<String>,
    pub signing_key: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error("cannot connect to the API server")]
    Client(#[from] ClientError),
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot serve health checks and metrics")]
    Serve(#[from] SecureServingError),
    #[error("cannot take part in leader election")]
    LeaderElection(#[source] LeaderElectionError),
    #[error("another process has become the leader")]
    LeadershipLost,
}

pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), AppError> {
    let client = options.kubeconfig.client("kube-controller-manager").await?;
    let file = |path: &Option<PathBuf>| path.as_deref().map(read).transpose();
    let root_ca = file(&options.root_ca_file)?;
    let service_account_key = file(&options.service_account_private_key_file)?;
    let signing_certificate = file(&options.cluster_signing_cert_file)?;
    let signing_key = file(&options.cluster_signing_key_file)?;
    options.serving.start(PORT, HealthChecks::default(), Arc::default(), &shutdown).await?;
    let leadership = match lead(&options, &client, &shutdown).await {
        Err(LeaderElectionError::Stopped) => return Ok(()),
        other => other.map_err(AppError::LeaderElection)?,
    };

    let work = CancellationToken::new();
    let rest = Rest::new(client.clone());
    let informers = Informers::new(client, work.clone());
    informers.of::<ConfigMap>().trim(drop_unread_data);
    informers.of::<Secret>().trim(drop_secret_data);
    let recorder = Recorder::start(rest.clone(), EventApi::Core, "kube-controller-manager", &hostname());
    let mut driver = Driver::new(rest, informers, recorder, work.clone());
    if options.use_service_account_credentials {
        driver = driver.with_service_accounts(options.kubeconfig.anonymous_client("kube-controller-manager").await?);
    }
    let own = driver.clone();
    let mut context = Context { driver, options, root_ca, service_account_key, signing_certificate, signing_key };
    for controller in ALL {
        if context.options.wants(controller.name, controller.alias, controller.off_by_default) {
            tracing::debug!(name = controller.name, "starting controller");
            context.driver =
                controller.service_account.map_or_else(|| own.clone(), |name| own.as_service_account(name));
            (controller.start)(&context);
        }
    }
    wait_for_end(leadership, &shutdown, &work).await
}

async fn lead(
    options: &Options,
    client: &kube::Client,
    shutdown: &CancellationToken,
) -> Result<Option<Leadership>, LeaderElectionError> {
    if !options.leader_election.leader_elect {
        return Ok(None);
    }
    let identity = format!("{}_{:032x}", hostname(), rand::random::<u128>());
    let election = options.leader_election.settings("kube-controller-manager", identity);
    election.acquire(client.clone(), shutdown).await.map(Some)
}

async fn wait_for_end(
    leadership: Option<Leadership>,
    shutdown: &CancellationToken,
    work: &CancellationToken,
) -> Result<(), AppError> {
    let Some(leadership) = leadership else {
        shutdown.cancelled().await;
        work.cancel();
        return Ok(());
    };
    tokio::select! {
        () = shutdown.cancelled() => {
            work.cancel();
            leadership.release().await;
            Ok(())
        }
        () = leadership.lost.cancelled() => {
            work.cancel();
            Err(AppError::LeadershipLost)
        }
    }
}

/// Config maps are watched for a few names; the data of all others would only take memory.
fn drop_unread_data(map: &mut ConfigMap) {
    if !controllers::READ_CONFIG_MAPS.contains(&name(&map.metadata)) {
        map.data = None;
        map.binary_data = None;
    }
}

/// Secrets are counted and their tokens looked after; what else they hold is nobody's business here.
fn drop_secret_data(secret: &mut Secret) {
    if !controllers::READ_SECRET_TYPES.contains(&secret.type_.as_deref().unwrap_or("")) {
        secret.data = None;
    }
}

fn read(path: &Path) -> Result<String, AppError> {
    std::fs::read_to_string(path).map_err(|source| AppError::Read { path: path.to_owned(), source })
}

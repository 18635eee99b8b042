//! The binary: flags in, leadership, then scheduling until the end.

use std::process::ExitCode;
use std::sync::Arc;

use apimachinery::controller::{EventApi, Informers, LeaderElectionError, Recorder, Rest};
use apimachinery::process::{CancellationToken, ClientError, HealthChecks, SecureServingError, hostname};
use clap::Parser;
use kube_scheduler::options::{ConfigurationError, Options};
use kube_scheduler::scheduler::Scheduler;

const SECURE_PORT: u16 = 10259;

#[derive(Debug, thiserror::Error)]
enum SchedulerError {
    #[error("the configuration cannot be used")]
    Configuration(#[from] ConfigurationError),
    #[error("cannot connect to the API server")]
    Client(#[from] ClientError),
    #[error("cannot serve health checks and metrics")]
    Serve(#[from] SecureServingError),
    #[error("cannot take part in leader election")]
    LeaderElection(#[from] LeaderElectionError),
    #[error("another process has become the leader")]
    LeadershipLost,
}

fn main() -> ExitCode {
    let options = Options::parse();
    apimachinery::process::run(&options.logs.clone(), |shutdown| run(options, shutdown))
}

async fn run(mut options: Options, shutdown: CancellationToken) -> Result<(), SchedulerError> {
    let profiles = options.complete()?;
    let client = options.kubeconfig.client("kube-scheduler").await?;
    options.serving.start(SECURE_PORT, HealthChecks::default(), Arc::default(), &shutdown).await?;

    let work = CancellationToken::new();
    let rest = Rest::new(client.clone());
    // The informers fill while another process may still lead, so that taking over costs no time.
    let informers = Informers::new(client.clone(), work.clone());
    let recorder = Recorder::start(rest.clone(), EventApi::Events, &profiles[0], &hostname());
    let scheduler = Scheduler::new(profiles, rest, &informers, recorder);
    informers.wait_synced().await;

    if !options.leader_election.leader_elect {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = scheduler.run() => {}
        }
        work.cancel();
        return Ok(());
    }
    let identity = format!("{}_{:032x}", hostname(), rand::random::<u128>());
    let election = options.leader_election.settings("kube-scheduler", identity);
    let leadership = match election.acquire(client, &shutdown).await {
        Err(LeaderElectionError::Stopped) => return Ok(()),
        other => other?,
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = scheduler.run() => {}
        () = leadership.lost.cancelled() => return Err(SchedulerError::LeadershipLost),
    }
    work.cancel();
    leadership.release().await;
    Ok(())
}

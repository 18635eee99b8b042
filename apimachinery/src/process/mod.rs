//! The plumbing that every binary needs and none should write again: the runtime, logs, signals, the API client and
//! the small HTTP server for health and metrics.

mod client;
mod logging;
mod secure_serving;
mod status_server;

use std::future::Future;
use std::process::ExitCode;

pub use client::{ClientError, KubeconfigArgs, client_from_kubeconfig};
pub use logging::LogArgs;
pub use secure_serving::{SecureServingArgs, SecureServingError};
pub use status_server::{HealthChecks, StatusServer, StatusServerError};
pub use tokio_util::sync::CancellationToken;

/// The version that our binaries report to clients and in node status: the upstream API level that they speak.
pub const KUBERNETES_VERSION: &str = "v1.37.2";

/// Starts logging and the runtime, runs `main` until it ends, and prints an error the way a person can act on it.
///
/// `main` gets a token that is cancelled at the first SIGTERM or SIGINT; a second signal ends the process at once.
pub fn run<F, Fut, E>(logs: &LogArgs, main: F) -> ExitCode
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: std::error::Error + 'static,
{
    logs.init();
    install_crypto_provider();
    let runtime =
        match tokio::runtime::Builder::new_multi_thread().worker_threads(worker_threads()).enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                eprintln!("error: cannot start the async runtime: {error}");
                return ExitCode::FAILURE;
            }
        };
    let result = runtime.block_on(async {
        let token = shutdown_token();
        main(token).await
    });
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error_chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Chooses ring as the process-wide TLS implementation; harmless when called twice.
pub fn install_crypto_provider() {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| !has_short_key(suite.suite()));
    let _ = provider.install_default();
}

/// Encrypting is most of what a large answer costs, and 128 bits cost a third less than 256: the first choice of Go's
/// TLS as well.
fn has_short_key(suite: rustls::CipherSuite) -> bool {
    use rustls::CipherSuite as Suite;
    matches!(
        suite,
        Suite::TLS13_AES_128_GCM_SHA256
            | Suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
            | Suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
    )
}

/// An error and its sources on one line, `outer: inner: innermost`, without repeating a text that is already there. Of
/// an answer of the API server it has the message alone.
pub fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let answer = api_answer(error);
        let part = answer.map_or_else(|| error.to_string(), |status| status.message.clone());
        if text.is_empty() {
            text = part;
        } else if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        next = if answer.is_some() { None } else { error.source() };
    }
    text
}

/// The status in a client's error, which would print itself twice and in all its fields.
fn api_answer<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a kube::core::Status> {
    let error = error.downcast_ref().or_else(|| error.downcast_ref::<Box<kube::Error>>().map(|boxed| &**boxed))?;
    let kube::Error::Api(status) = error else { return None };
    (!status.message.is_empty()).then_some(&**status)
}

/// More threads than this only cost memory: the work is I/O.
fn worker_threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).clamp(1, 4)
}

fn shutdown_token() -> CancellationToken {
    use tokio::signal::unix::{SignalKind, signal};
    let token = CancellationToken::new();
    let cancel = token.clone();
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::spawn(async move {
                for round in 0..2 {
                    tokio::select! {
                        _ = terminate.recv() => {}
                        _ = interrupt.recv() => {}
                    }
                    if round == 0 {
                        tracing::info!("signal received, shutting down");
                        cancel.cancel();
                    }
                }
                std::process::exit(1);
            });
        }
        (Err(error), _) | (_, Err(error)) => tracing::error!(%error, "cannot listen for signals"),
    }
    token
}

/// The machine's host name, as the kernel has it.
pub fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "localhost".to_owned() } else { name.to_owned() }
}

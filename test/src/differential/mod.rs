//! The same requests to two API servers, ours and upstream's, and what differs in their answers. What is asked is data
//! (`test/differential/`): objects of every kind in `kinds/`, requests made for every kind in `every-kind.yaml`, and
//! hand-written conversations in `scripts/`. Differences that are known are in `known.yaml`, each with its reason.
//!
//! Nothing here knows what the right answer is: upstream's is.

pub mod client;
pub mod compare;
pub mod corpus;
pub mod known;
pub mod mutate;
pub mod normalize;
pub mod play;
pub mod server;

use std::path::PathBuf;

/// Where the data is.
pub fn data() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("differential")
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0} is not set: this test is run by hack/differential")]
    Setting(&'static str),
    #[error("cannot make the keys of the servers")]
    Keys(#[from] rcgen::Error),
    #[error("cannot use {path}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("cannot start {program}")]
    Start { program: PathBuf, source: std::io::Error },
    #[error("{what} was not ready within {seconds} s; last seen: {last}; its log is {log}")]
    NotReady { what: String, seconds: u64, last: String, log: PathBuf },
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    #[error("{request}: no answer: {why}")]
    NoAnswer { request: String, why: String },
    #[error("{request}: the request is malformed")]
    Request { request: String, source: http::Error },
    #[error("{path} is not what the test reads")]
    Data { path: PathBuf, source: Box<serde_saphyr::Error> },
    #[error("{case}: {why}")]
    Case { case: String, why: String },
    #[error("no objects in test/differential/kinds for: {0}")]
    Uncovered(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

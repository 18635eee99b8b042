//! kube-controller-manager: the loops that move the cluster from what it is to what its objects ask for.
//!
//! It talks to the API server only. Each controller decides purely from shared informers (`controllers/`), a driver
//! executes; of several running managers one works, by leader election.

// Builders of test objects read best when they take what `json!` makes.
#![cfg_attr(test, allow(clippy::needless_pass_by_value))]

mod app;
mod common;
mod controllers;
mod discovery;
mod gc;
mod options;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let options = options::Options::parse();
    apimachinery::process::run(&options.logs.clone(), |shutdown| app::run(options, shutdown))
}

//! Regenerates the table of facts about the built-in kinds: `cargo run -p ketch --bin facts -- --modules ~/go/pkg/mod`.

#[path = "../facts/mod.rs"]
mod facts;

use clap::Parser;

fn main() -> anyhow::Result<()> {
    facts::run(&facts::Args::parse())
}

//! Measures what an overlay network carries: iperf3 between pods on two virtual nodes, on each backend, with this
//! project's flanneld and upstream's in turns. The nodes are the laboratory's of the live tests; like a test, it ends
//! with a message when it cannot be set up.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ketch_test::overlay::{Lab, PREFIX};
use serde_json::{Value, json};

use crate::cluster::plan::cache_dir;

#[derive(Args)]
pub struct OverlayArgs {
    /// The directory with upstream's programs, as hack/upstream/build DIRECTORY overlay fills it.
    #[arg(long, default_value_os_t = cache_dir().join("upstream"))]
    upstream: PathBuf,
    /// This project's flanneld; the one beside ketch by default.
    #[arg(long)]
    flanneld: Option<PathBuf>,
    #[arg(long, value_delimiter = ',', default_value = "vxlan,host-gw,udp")]
    backends: Vec<String>,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Measurements of each program on each backend, in turns; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// Write the table to this file, too.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// What one backend carries with each program, in bits per second.
struct Figures {
    backend: String,
    ours: Vec<f64>,
    upstream: Vec<f64>,
}

pub fn run(args: &OverlayArgs) -> Result<()> {
    let ours = match &args.flanneld {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("cannot find this program")?.with_file_name("flanneld"),
    };
    let mut all = Vec::new();
    for backend in &args.backends {
        // Upstream's udp needs cgo, so that it is in a program of its own.
        let name = if backend == "udp" { "flanneld-udp" } else { "flanneld" };
        let upstream = args.upstream.join(name);
        ensure!(
            upstream.is_file(),
            "{} lacks {name}: run hack/upstream/build {} overlay",
            args.upstream.display(),
            args.upstream.display()
        );
        let mut figures = Figures { backend: backend.clone(), ours: Vec::new(), upstream: Vec::new() };
        let (mine, theirs) = (Overlay::new(backend, &ours), Overlay::new(backend, &upstream));
        for round in 0..args.rounds {
            // Each is as often the first, so that a machine that grows slower favours none.
            if round % 2 == 0 {
                figures.ours.push(mine.throughput(args.seconds)?);
                figures.upstream.push(theirs.throughput(args.seconds)?);
            } else {
                figures.upstream.push(theirs.throughput(args.seconds)?);
                figures.ours.push(mine.throughput(args.seconds)?);
            }
            let last = |all: &[f64]| all.last().copied().unwrap_or_default() / 1e9;
            eprintln!("{backend}: {:.2} and {:.2} Gbit/s", last(&figures.ours), last(&figures.upstream));
        }
        all.push(figures);
    }
    let report = report(&all, args);
    println!("\n{report}");
    match &args.output {
        Some(file) => std::fs::write(file, report).with_context(|| format!("cannot write {}", file.display())),
        None => Ok(()),
    }
}

/// Two nodes with a pod each; an iperf3 server runs in one.
struct Overlay {
    // Ended before the laboratory whose namespace it is in: fields are dropped in this order.
    _server: Server,
    _lab: Lab,
    client: String,
    address: String,
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It ends with its namespace otherwise.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Overlay {
    fn new(backend: &str, program: &Path) -> Self {
        let mut lab = Lab::new();
        lab.configure(PREFIX, &json!({"Network": "10.244.0.0/16", "Backend": {"Type": backend}}));
        let mut pods = [2, 3].map(|number| {
            let node = lab.node(number);
            lab.flanneld(&node, program, &["--ip-masq"]);
            lab.pod(&node)
        });
        let (server, addresses) = std::mem::take(&mut pods[1]);
        let (client, _) = std::mem::take(&mut pods[0]);
        let address = addresses[0].clone();
        lab.reaches(&client, &address);
        let child = Command::new("ip")
            .args(["netns", "exec", &server, "iperf3", "--server"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run iperf3 (is it installed?): {error}"));
        Self { _server: Server(child), _lab: lab, client, address }
    }

    fn throughput(&self, seconds: u64) -> Result<f64> {
        let time = seconds.to_string();
        // The server takes a moment to listen at first.
        let text = ketch_test::poll("iperf3 measures", ketch_test::LIMIT, || {
            let output = Command::new("ip")
                .args(["netns", "exec", &self.client, "iperf3", "--client", &self.address, "--json", "--time", &time])
                .output()
                .map_err(|error| error.to_string())?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if output.status.success() { Ok(text) } else { Err(text) }
        });
        let result: Value = serde_json::from_str(&text).context("iperf3 did not answer in JSON")?;
        result["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 did not say what was received")
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn report(all: &[Figures], args: &OverlayArgs) -> String {
    let mut text = format!(
        "One TCP stream between pods on two nodes, median of {} times {} s, in turns.\n\n\
         | backend | Ketch | upstream | Ketch ÷ upstream |\n| --- | ---: | ---: | ---: |\n",
        args.rounds, args.seconds
    );
    for figures in all {
        let (ours, upstream) = (median(&figures.ours), median(&figures.upstream));
        let _ = writeln!(
            text,
            "| {} | {:.2} Gbit/s | {:.2} Gbit/s | {:.2}× |",
            figures.backend,
            ours / 1e9,
            upstream / 1e9,
            ours / upstream
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_any_number() {
        for (values, expected) in [(&[][..], 0.0), (&[3.0], 3.0), (&[4.0, 1.0], 2.5), (&[9.0, 1.0, 2.0], 2.0)] {
            assert!((median(values) - expected).abs() < f64::EPSILON, "{values:?}");
        }
    }
}

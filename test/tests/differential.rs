//! Ours and upstream's API server answer alike. `hack/differential` runs it; KETCH_DIFFERENTIAL, a regular
//! expression, narrows it to scripts and kinds with such names, KETCH_REPORT names a folder for all that differs and the servers' logs.

use std::collections::BTreeMap;
use std::time::Instant;

use ketch_test::differential::compare::Difference;
use ketch_test::differential::play::{self, Pair};
use ketch_test::differential::server::{ApiServer, Etcd, Keys, Programs};
use ketch_test::differential::{Error, Result, corpus, data, known};

/// How many differences the failure prints; the report has all.
const SHOWN: usize = 40;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs upstream's kube-apiserver: run by hack/differential"]
async fn answers_are_upstreams() -> Result<()> {
    let programs = Programs::from_env()?;
    let report = std::env::var("KETCH_REPORT").map_err(|_| Error::Setting("KETCH_REPORT"))?;
    let keys = Keys::make(report.as_ref())?;
    let (our_etcd, their_etcd) = (Etcd::start(&programs.etcd)?, Etcd::start(&programs.etcd)?);
    let (ours, upstream) = futures::try_join!(
        ApiServer::start(&programs.ours, "ours", &our_etcd, &keys),
        ApiServer::start(&programs.upstream, "upstream", &their_etcd, &keys),
    )?;
    let pair = Pair { ours: ours.client.clone(), upstream: upstream.client.clone() };
    let only = std::env::var("KETCH_DIFFERENTIAL").unwrap_or_default();
    let chosen =
        regex::Regex::new(&only).map_err(|error| Error::Case { case: only.clone(), why: error.to_string() })?;
    let (found, requests) = everything(&pair, &chosen, &report).await?;

    let verdict = known::judge(&known::read(&data())?, found, only.is_empty());
    println!("{requests} requests, {} known differences, {} new", verdict.listed, verdict.unlisted.len());
    write(&format!("{report}/differences.txt"), &verdict.unlisted)?;
    let shown: Vec<String> = verdict.unlisted.iter().take(SHOWN).map(ToString::to_string).collect();
    assert!(
        verdict.unlisted.is_empty() && verdict.unused.is_empty(),
        "{} differences are not in known.yaml:\n{}\n{} entries of known.yaml no longer occur:\n{}",
        verdict.unlisted.len(),
        shown.join("\n"),
        verdict.unused.len(),
        verdict.unused.join("\n")
    );
    Ok(())
}

async fn everything(pair: &Pair, chosen: &regex::Regex, report: &str) -> Result<(Vec<Difference>, usize)> {
    let (mut found, mut requests) = (Vec::new(), 0);
    for script in corpus::scripts(&data())?.iter().filter(|script| chosen.is_match(&script.name)) {
        let (differences, asked) = play::script(pair, script).await?;
        println!("{}: {asked} requests, {} differences", script.name, differences.len());
        found.extend(differences);
        write(&format!("{report}/found.txt"), &found)?;
        requests += asked;
    }
    let mut facts = play::discover(&pair.upstream).await?;
    let steps: Vec<corpus::Step> = corpus::read(&data().join("every-kind.yaml"))?;
    let mut uncovered = facts.clone();
    for kind in corpus::kinds(&data())? {
        uncovered.remove(&kind.id());
        let Some(facts) = facts.remove(&kind.id()) else {
            return Err(Error::Case { case: kind.id(), why: "upstream's discovery does not have it".into() });
        };
        if chosen.is_match(&kind.id()) {
            let start = Instant::now();
            let (differences, asked) = play::kind(pair, &kind, &facts, &steps).await?;
            println!("{}: {asked} requests, {} differences, {:?}", kind.id(), differences.len(), start.elapsed());
            found.extend(differences);
            requests += asked;
            write(&format!("{report}/found.txt"), &found)?;
        }
    }
    uncovered.retain(|_, facts| facts.has.contains("create"));
    if uncovered.is_empty() { Ok((found, requests)) } else { Err(Error::Uncovered(names(&uncovered))) }
}

fn names<T>(map: &BTreeMap<String, T>) -> String {
    map.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn write(path: &str, differences: &[Difference]) -> Result<()> {
    let text: Vec<String> = differences.iter().map(ToString::to_string).collect();
    std::fs::write(path, text.join("\n")).map_err(|source| Error::File { path: path.into(), source })
}

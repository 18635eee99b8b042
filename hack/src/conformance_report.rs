//! Reads the reports that a conformance run wrote, lists what failed and why, and closes with the counts.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Option<Vec<Spec>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    leaf_node_type: String,
    leaf_node_text: String,
    container_hierarchy_texts: Option<Vec<String>>,
    state: String,
    run_time: u64,
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    message: String,
}

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    state: String,
    name: String,
    seconds: u64,
    why: String,
}

/// Prints the failures of every `*.json` report in the directory, writes `results.tsv` beside them, and answers whether
/// anything ran and nothing failed.
pub fn report(dir: &Path) -> Result<bool> {
    let mut outcomes = Vec::new();
    let mut broken = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            read(&text, &mut outcomes, &mut broken).with_context(|| format!("{} is no report", path.display()))?;
        }
    }
    if outcomes.is_empty() && broken.is_empty() {
        bail!("no test ran: see the logs in {}", dir.display());
    }
    outcomes.sort_by(|a, b| (&a.state, &a.name).cmp(&(&b.state, &b.name)));
    let table: String =
        outcomes.iter().map(|o| format!("{}\t{}\t{}\t{}\n", o.state, o.seconds, o.name, o.why)).collect();
    fs::write(dir.join("results.tsv"), table).context("cannot write results.tsv")?;
    for problem in &broken {
        println!("SUITE {problem}");
    }
    let count = |state: &str| outcomes.iter().filter(|o| o.state == state).count();
    let (passed, skipped) = (count("passed"), count("skipped"));
    let failed = outcomes.len() - passed - skipped;
    for outcome in outcomes.iter().filter(|o| !matches!(o.state.as_str(), "passed" | "skipped")) {
        println!("{} {}\n    {}", outcome.state.to_uppercase(), outcome.name, outcome.why);
    }
    println!("reports: {}", dir.display());
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0 && broken.is_empty())
}

fn read(text: &[u8], outcomes: &mut Vec<Outcome>, broken: &mut Vec<String>) -> Result<()> {
    let suites: Vec<Suite> = serde_json::from_slice(text)?;
    for spec in suites.into_iter().flat_map(|suite| suite.spec_reports.unwrap_or_default()) {
        let why = spec.failure.map(|f| f.message.split_whitespace().collect::<Vec<_>>().join(" ")).unwrap_or_default();
        let why: String = why.chars().take(400).collect();
        if spec.leaf_node_type != "It" {
            if spec.state != "passed" && spec.state != "skipped" {
                broken.push(format!("{} {}: {why}", spec.leaf_node_type, spec.state));
            }
            continue;
        }
        // Filtered out by the focus: a test that skips itself says why.
        if (spec.state == "skipped" && why.is_empty()) || spec.state == "pending" {
            continue;
        }
        let mut words = spec.container_hierarchy_texts.unwrap_or_default();
        words.push(spec.leaf_node_text);
        outcomes.push(Outcome {
            state: spec.state,
            name: words.join(" "),
            seconds: spec.run_time / 1_000_000_000,
            why,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filtered_tests_do_not_count() {
        let report = br#"[{"SpecReports": [
            {"LeafNodeType": "It", "LeafNodeText": "works", "ContainerHierarchyTexts": ["a"], "State": "passed", "RunTime": 2000000000},
            {"LeafNodeType": "It", "LeafNodeText": "other", "ContainerHierarchyTexts": null, "State": "skipped", "RunTime": 0},
            {"LeafNodeType": "It", "LeafNodeText": "breaks", "ContainerHierarchyTexts": ["a"], "State": "failed", "RunTime": 0,
             "Failure": {"Message": "it\n  broke"}},
            {"LeafNodeType": "BeforeSuite", "LeafNodeText": "", "ContainerHierarchyTexts": [], "State": "failed", "RunTime": 0,
             "Failure": {"Message": "no cluster"}}
        ]}]"#;
        let (mut outcomes, mut broken) = (Vec::new(), Vec::new());
        read(report, &mut outcomes, &mut broken).unwrap();
        assert_eq!(outcomes.len(), 2);
        assert_eq!(
            outcomes[0],
            Outcome { state: "passed".into(), name: "a works".into(), seconds: 2, why: String::new() }
        );
        assert_eq!(outcomes[1].why, "it broke");
        assert_eq!(broken, ["BeforeSuite failed: no cluster"]);
    }
}

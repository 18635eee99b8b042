//! `/version`: which Kubernetes this server is compatible with, in upstream's shape.

use apimachinery::process::KUBERNETES_VERSION;
use serde_json::{Value, json};

pub fn document() -> Value {
    let mut numbers = KUBERNETES_VERSION.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let before = minor.parse::<u32>().map(|minor| minor.saturating_sub(1).to_string()).unwrap_or_default();
    json!({
        "major": major,
        "minor": minor,
        "emulationMajor": major,
        "emulationMinor": minor,
        "minCompatibilityMajor": major,
        "minCompatibilityMinor": before,
        "gitVersion": KUBERNETES_VERSION,
        "gitCommit": option_env!("KETCH_GIT_COMMIT").unwrap_or("unknown"),
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "rustc",
        "platform": format!("{}/{}", std::env::consts::OS, architecture()),
    })
}

/// The architecture as Go names it, which is what clients compare with.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_are_those_of_the_version() {
        let document = super::document();
        assert_eq!((document["major"].as_str(), document["minor"].as_str()), (Some("1"), Some("37")));
        assert_eq!(document["minCompatibilityMinor"], "36");
    }
}

//! The CNI plugin `flannel`: turns flanneld's subnet file into a configuration for another plugin (bridge, unless
//! told otherwise) and lets that do the work. On ADD the configuration is saved under the container's ID, so that DEL
//! undoes exactly what ADD did even when the subnet has changed since.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::subnet::{SubnetFile, SubnetFileError};

/// Versions of the CNI specification that can be asked for.
const VERSIONS: [&str; 9] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0", "", "current"];
const NEWEST: &str = "1.1.0";

/// What the runtime passes in the environment.
#[derive(Clone, Debug, Default)]
pub struct Invocation {
    pub command: String,
    pub container_id: String,
    /// Directories with plugins, separated by colons.
    pub path: String,
    /// The configuration from standard input.
    pub config: String,
}

/// What to print on standard output and how to exit.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub output: String,
    pub success: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum CniError {
    #[error("CNI_COMMAND is {0:?}, which is none of ADD, DEL, CHECK, GC, STATUS and VERSION")]
    Command(String),
    #[error("CNI_CONTAINERID {0:?} is not a container ID")]
    ContainerId(String),
    #[error("the network configuration cannot be read")]
    Decode(#[source] serde_json::Error),
    #[error("CNI version {0:?} is not supported")]
    Version(String),
    #[error("'delegate' must not have '{0}': flannel sets it")]
    Reserved(&'static str),
    #[error("'delegate' must have a string as 'type'")]
    DelegateType,
    #[error("the subnet of this node is not known; is flanneld running?")]
    Subnet(#[from] SubnetFileError),
    #[error("cannot keep the delegate's configuration in {path}")]
    Save { path: PathBuf, source: std::io::Error },
    #[error("plugin {plugin:?} is not in CNI_PATH {path:?}")]
    PluginNotFound { plugin: String, path: String },
    #[error("cannot run plugin {path}")]
    Run { path: PathBuf, source: std::io::Error },
}

impl CniError {
    /// The specification's codes: below 100 they have a fixed meaning.
    fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Reserved(_) | Self::DelegateType => 7,
            Self::Command(_) | Self::ContainerId(_) => 4,
            Self::Decode(_) => 6,
            Self::Save { .. } => 5,
            // Try again later: flanneld will write the file.
            Self::Subnet(_) => 11,
            Self::PluginNotFound { .. } | Self::Run { .. } => 100,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    ipam: Option<Map<String, Value>>,
    #[serde(default = "default_subnet_file")]
    subnet_file: PathBuf,
    #[serde(default = "default_data_dir")]
    data_dir: PathBuf,
    #[serde(default)]
    delegate: Map<String, Value>,
    runtime_config: Option<Value>,
    prev_result: Option<Value>,
}

fn default_subnet_file() -> PathBuf {
    PathBuf::from("/run/flannel/subnet.env")
}

fn default_data_dir() -> PathBuf {
    PathBuf::from("/var/lib/cni/flannel")
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ErrorResult<'a> {
    cni_version: &'a str,
    code: u32,
    msg: String,
}

/// Answers one call of the runtime.
pub fn run(invocation: &Invocation) -> Answer {
    match dispatch(invocation) {
        Ok(answer) => answer,
        Err(error) => {
            let result = ErrorResult {
                cni_version: NEWEST,
                code: error.code(),
                msg: apimachinery::process::error_chain(&error),
            };
            Answer { output: json!(result).to_string(), success: false }
        }
    }
}

fn dispatch(invocation: &Invocation) -> Result<Answer, CniError> {
    let done = Answer { output: String::new(), success: true };
    if invocation.command == "VERSION" {
        let supported: Vec<&str> = VERSIONS.into_iter().filter(|version| version.contains('.')).collect();
        let output = json!({"cniVersion": NEWEST, "supportedVersions": supported}).to_string();
        return Ok(Answer { output, ..done });
    }
    let config: Config = serde_json::from_str(&invocation.config).map_err(CniError::Decode)?;
    if !VERSIONS.contains(&config.cni_version.as_str()) {
        return Err(CniError::Version(config.cni_version));
    }
    match invocation.command.as_str() {
        "ADD" => add(invocation, config),
        "DEL" => delete(invocation, config),
        "CHECK" => check(invocation, config),
        "STATUS" => SubnetFile::read(&config.subnet_file).map(|_| done).map_err(CniError::from),
        // The delegate's own collection is called by the runtime; ours are only files that DEL removes.
        "GC" => Ok(done),
        other => Err(CniError::Command(other.to_owned())),
    }
}

fn add(invocation: &Invocation, config: Config) -> Result<Answer, CniError> {
    let saved = saved_path(&config.data_dir, &invocation.container_id)?;
    let subnet = SubnetFile::read(&config.subnet_file)?;
    let delegate = delegate(config, &subnet)?;
    let text = Value::Object(delegate.clone()).to_string();
    save(&saved, &text).map_err(|source| CniError::Save { path: saved, source })?;
    execute(invocation, &delegate, &text)
}

/// DEL succeeds when there is nothing (any more) to delete.
fn delete(invocation: &Invocation, config: Config) -> Result<Answer, CniError> {
    let saved = saved_path(&config.data_dir, &invocation.container_id)?;
    let Some(mut delegate) = saved_delegate(&saved)? else {
        return Ok(Answer { output: String::new(), success: true });
    };
    if let Some(result) = config.prev_result {
        delegate.insert("prevResult".to_owned(), result);
    }
    let text = Value::Object(delegate.clone()).to_string();
    let answer = execute(invocation, &delegate, &text)?;
    if answer.success {
        match std::fs::remove_file(&saved) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(CniError::Save { path: saved, source });
            }
            _ => {}
        }
    }
    Ok(answer)
}

fn check(invocation: &Invocation, config: Config) -> Result<Answer, CniError> {
    let saved = saved_path(&config.data_dir, &invocation.container_id)?;
    let mut delegate = match saved_delegate(&saved)? {
        Some(delegate) => delegate,
        None => return Err(CniError::Save { path: saved, source: std::io::ErrorKind::NotFound.into() }),
    };
    if let Some(result) = config.prev_result {
        delegate.insert("prevResult".to_owned(), result);
    }
    let text = Value::Object(delegate.clone()).to_string();
    execute(invocation, &delegate, &text)
}

/// The configuration for the plugin that does the work.
fn delegate(config: Config, subnet: &SubnetFile) -> Result<Map<String, Value>, CniError> {
    let mut delegate = config.delegate;
    for reserved in ["name", "ipam"] {
        if delegate.contains_key(reserved) {
            return Err(CniError::Reserved(reserved));
        }
    }
    let kind = delegate.entry("type").or_insert_with(|| json!("bridge"));
    let bridge = kind.as_str().ok_or(CniError::DelegateType)? == "bridge";
    delegate.insert("name".to_owned(), json!(config.name));
    if !config.cni_version.is_empty() {
        delegate.insert("cniVersion".to_owned(), json!(config.cni_version));
    }
    // If flanneld does not masquerade, the bridge must.
    delegate.entry("ipMasq").or_insert_with(|| json!(!subnet.ip_masq));
    delegate.entry("mtu").or_insert_with(|| json!(subnet.mtu));
    if bridge {
        delegate.entry("isGateway").or_insert_with(|| json!(true));
    }
    if let Some(runtime_config) = config.runtime_config {
        delegate.insert("runtimeConfig".to_owned(), runtime_config);
    }
    delegate.insert("ipam".to_owned(), Value::Object(ipam(config.ipam.unwrap_or_default(), subnet)));
    Ok(delegate)
}

/// Addresses from this node's subnets, and routes to the whole networks beside the routes that were asked for.
fn ipam(mut ipam: Map<String, Value>, subnet: &SubnetFile) -> Map<String, Value> {
    ipam.entry("type").or_insert_with(|| json!("host-local"));
    let ranges: Vec<Value> = subnet.subnets().iter().map(|subnet| json!([{"subnet": subnet}])).collect();
    ipam.insert("ranges".to_owned(), Value::Array(ranges));
    let mut routes = match ipam.remove("routes") {
        Some(Value::Array(routes)) => routes,
        _ => Vec::new(),
    };
    routes.extend(subnet.networks().map(|network| json!({"dst": network})));
    ipam.insert("routes".to_owned(), Value::Array(routes));
    ipam
}

/// Container IDs become file names, so they must not be paths.
fn saved_path(data_dir: &Path, container_id: &str) -> Result<PathBuf, CniError> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if !container_id.starts_with(|c: char| c.is_ascii_alphanumeric()) || !container_id.chars().all(legal) {
        return Err(CniError::ContainerId(container_id.to_owned()));
    }
    Ok(data_dir.join(container_id))
}

fn save(path: &Path, text: &str) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    if let Some(directory) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(text.as_bytes())
}

fn saved_delegate(path: &Path) -> Result<Option<Map<String, Value>>, CniError> {
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text).map(Some).map_err(CniError::Decode),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CniError::Save { path: path.to_owned(), source }),
    }
}

/// Runs the delegate with our environment; its output and its success are ours.
fn execute(invocation: &Invocation, delegate: &Map<String, Value>, text: &str) -> Result<Answer, CniError> {
    let plugin = delegate.get("type").and_then(Value::as_str).ok_or(CniError::DelegateType)?;
    if plugin.is_empty() || plugin.contains('/') {
        return Err(CniError::DelegateType);
    }
    let path =
        std::env::split_paths(&invocation.path).map(|directory| directory.join(plugin)).find(|path| path.is_file());
    let path =
        path.ok_or_else(|| CniError::PluginNotFound { plugin: plugin.to_owned(), path: invocation.path.clone() })?;
    let output = pipe(&path, text).map_err(|source| CniError::Run { path, source })?;
    Ok(Answer { output: String::from_utf8_lossy(&output.stdout).into_owned(), success: output.status.success() })
}

fn pipe(path: &Path, text: &str) -> std::io::Result<std::process::Output> {
    let mut child = Command::new(path).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    child.wait_with_output()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subnet::testing::{dual_stack, file};

    fn delegate_for(config: Value) -> Result<Value, CniError> {
        delegate(serde_json::from_value(config).unwrap(), &file()).map(Value::Object)
    }

    #[test]
    fn the_usual_configuration_becomes_a_bridge() {
        let config = json!({"cniVersion": "1.0.0", "name": "cbr0", "type": "flannel",
            "delegate": {"hairpinMode": true, "isDefaultGateway": true}});
        assert_eq!(
            delegate_for(config).unwrap(),
            json!({"cniVersion": "1.0.0", "name": "cbr0", "type": "bridge", "hairpinMode": true,
                "isDefaultGateway": true, "isGateway": true, "ipMasq": false, "mtu": 1450,
                "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.7.0/24"}]],
                    "routes": [{"dst": "10.244.0.0/16"}]}})
        );
    }

    #[test]
    fn dual_stack_has_a_range_and_a_route_for_each_family() {
        let ipam = Value::Object(ipam(Map::new(), &dual_stack()));
        assert_eq!(ipam["ranges"], json!([[{"subnet": "10.244.7.0/24"}], [{"subnet": "fd00:0:0:7::/64"}]]));
        assert_eq!(ipam["routes"], json!([{"dst": "10.244.0.0/16"}, {"dst": "fd00::/48"}]));
    }

    #[test]
    fn settings_of_the_user_win() {
        let config = json!({"name": "n", "delegate": {"type": "macvlan", "ipMasq": true, "mtu": 1400},
            "ipam": {"routes": [{"dst": "0.0.0.0/0"}]}, "runtimeConfig": {"mac": "x"}});
        let delegate = delegate_for(config).unwrap();
        assert_eq!(delegate["mtu"], 1400);
        assert_eq!(delegate["ipMasq"], true);
        assert_eq!(delegate.get("isGateway"), None);
        assert_eq!(delegate["ipam"]["routes"], json!([{"dst": "0.0.0.0/0"}, {"dst": "10.244.0.0/16"}]));
        assert_eq!(delegate["runtimeConfig"], json!({"mac": "x"}));
    }

    #[test]
    fn what_flannel_sets_may_not_be_given() {
        assert!(matches!(delegate_for(json!({"delegate": {"name": "x"}})), Err(CniError::Reserved("name"))));
        assert!(matches!(delegate_for(json!({"delegate": {"type": 7}})), Err(CniError::DelegateType)));
    }

    #[test]
    fn container_ids_are_no_paths() {
        assert!(saved_path(Path::new("/d"), "../etc/passwd").is_err());
        assert!(saved_path(Path::new("/d"), "").is_err());
        assert_eq!(saved_path(Path::new("/d"), "abc.1_2-3").unwrap(), Path::new("/d/abc.1_2-3"));
    }

    #[test]
    fn errors_are_results_of_the_specification() {
        let answer = run(&Invocation { command: "ADD".to_owned(), config: "{".to_owned(), ..Invocation::default() });
        assert!(!answer.success);
        let value: Value = serde_json::from_str(&answer.output).unwrap();
        assert_eq!(value["code"], 6);
        let version = run(&Invocation { command: "VERSION".to_owned(), ..Invocation::default() });
        assert!(version.output.contains("\"supportedVersions\":[\"0.1.0\""), "{}", version.output);
    }

    #[test]
    fn add_and_delete_go_through_the_delegate() {
        use std::os::unix::fs::PermissionsExt;
        let directory = std::env::temp_dir().join(format!("ketch-cni-{}", std::process::id()));
        std::fs::create_dir_all(directory.join("bin")).unwrap();
        let plugin = directory.join("bin/bridge");
        std::fs::write(&plugin, "#!/bin/sh\ncat\n").unwrap();
        std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
        file().write(&directory.join("subnet.env")).unwrap();
        let config = json!({"cniVersion": "1.0.0", "name": "cbr0", "dataDir": directory.join("data"),
            "subnetFile": directory.join("subnet.env")});
        let mut invocation = Invocation {
            command: "ADD".to_owned(),
            container_id: "c1".to_owned(),
            path: format!("/nonexistent:{}", directory.join("bin").display()),
            config: config.to_string(),
        };
        let answer = run(&invocation);
        assert!(answer.success && answer.output.contains("10.244.7.0/24"), "{answer:?}");
        std::fs::remove_file(directory.join("subnet.env")).unwrap();
        invocation.command = "DEL".to_owned();
        let answer = run(&invocation);
        assert!(answer.success && answer.output.contains("10.244.7.0/24"), "{answer:?}");
        assert_eq!(run(&invocation), Answer { output: String::new(), success: true });
        std::fs::remove_dir_all(directory).unwrap();
    }
}

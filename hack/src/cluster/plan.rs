//! What a cluster is made of: its names, addresses, directories and programs. Written to `cluster.json` in the data
//! directory, from where every later command reads it.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::cgroups;

/// The programs of the project, which `--bin` can replace one by one, and the foreign ones beside them.
pub const COMPONENTS: [&str; 11] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "flanneld",
    "flannel",
    "cluster-dns",
    "etcd",
    "containerd",
    "runc",
];

/// The pods' network, as the tutorial has it.
pub const POD_CIDR: &str = "10.244.0.0/16";
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
pub const API_SERVICE_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub const DNS_SERVICE_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
pub const CLUSTER_DOMAIN: &str = "cluster.local";
/// The fabric's own address, every node's default gateway.
pub const FABRIC_IP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
pub const MASTER: &str = "master";

#[derive(Args, Clone, Debug)]
pub struct ClusterOptions {
    /// The cluster's name; clusters with different names live side by side.
    #[arg(long, default_value = "ketch")]
    pub name: String,
    /// Worker nodes beside the master.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub nodes: u8,
    /// Members of the etcd cluster: 3 places one on the master and on each of the first two nodes.
    #[arg(long, default_value_t = 3, value_parser = parse_members)]
    pub etcd: u8,
    /// How flannel carries packets between nodes.
    #[arg(long, value_enum, default_value_t = FlannelBackend::Vxlan)]
    pub flannel_backend: FlannelBackend,
    /// How kube-proxy programs the kernel.
    #[arg(long, value_enum, default_value_t = ProxyMode::Nftables)]
    pub proxy_mode: ProxyMode,
    /// Where clusters keep their data, each in a directory of its name.
    #[arg(long, default_value_os_t = clusters_root())]
    pub data_dir: PathBuf,
    /// The port on 127.0.0.1 where the API is reachable from the host; a free one is taken when it is in use.
    #[arg(long, default_value_t = 6443)]
    pub port: u16,
    /// Run another binary in a component's place, e.g. --bin kubelet=/usr/local/bin/kubelet. Repeatable.
    #[arg(long = "bin", value_name = "COMPONENT=PATH", value_parser = parse_bin)]
    pub bins: Vec<(String, PathBuf)>,
    /// An archive of container images (docker or OCI) to load into every node. Repeatable. Those in an OCI archive can
    /// also be pulled, unless another registry is given.
    #[arg(long = "images", value_name = "FILE")]
    pub images: Vec<PathBuf>,
    /// Further flags for a component, e.g. --flags "kube-apiserver=--v=4". Repeatable.
    #[arg(long = "flags", value_name = "COMPONENT=FLAGS", value_parser = parse_flags)]
    pub flags: Vec<(String, String)>,
    /// Address of an image registry that nodes use as a mirror for every other, e.g. http://10.99.0.1.
    #[arg(long)]
    pub registry_mirror: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlannelBackend {
    Vxlan,
    HostGw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProxyMode {
    Nftables,
    Iptables,
}

impl FlannelBackend {
    pub fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
        }
    }
}

impl ProxyMode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    pub name: String,
    /// The cluster's own directory, absolute.
    pub data_dir: PathBuf,
    pub workers: u8,
    pub etcd_members: u8,
    pub flannel_backend: FlannelBackend,
    pub proxy_mode: ProxyMode,
    pub api_port: u16,
    /// Absolute paths of every program in [`COMPONENTS`].
    pub bins: BTreeMap<String, PathBuf>,
    pub images: Vec<PathBuf>,
    pub flags: BTreeMap<String, Vec<String>>,
    pub registry_mirror: Option<String>,
    pub cgroups: cgroups::Version,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    pub ip: Ipv4Addr,
    pub runs_etcd: bool,
}

/// `/var/lib/ketch`, or what `KETCH_DATA` says.
pub fn clusters_root() -> PathBuf {
    std::env::var_os("KETCH_DATA").map_or_else(|| PathBuf::from("/var/lib/ketch"), PathBuf::from)
}

/// Where downloads that outlive a cluster are kept.
pub fn cache_dir() -> PathBuf {
    std::env::var_os("KETCH_CACHE").map_or_else(|| PathBuf::from("/var/cache/ketch"), PathBuf::from)
}

fn parse_members(text: &str) -> Result<u8, String> {
    match text {
        "1" => Ok(1),
        "3" => Ok(3),
        other => Err(format!("{other} is not 1 or 3")),
    }
}

fn component(name: &str) -> Result<String, String> {
    if COMPONENTS.contains(&name) {
        Ok(name.to_owned())
    } else {
        Err(format!("{name:?} is no component; the components are {}", COMPONENTS.join(", ")))
    }
}

fn parse_bin(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("expected COMPONENT=PATH")?;
    let path = std::fs::canonicalize(path).map_err(|e| format!("{path}: {e}"))?;
    Ok((component(name)?, path))
}

fn parse_flags(text: &str) -> Result<(String, String), String> {
    let (name, flags) = text.split_once('=').ok_or("expected COMPONENT=FLAGS")?;
    Ok((component(name)?, flags.to_owned()))
}

impl Plan {
    pub fn new(options: &ClusterOptions) -> Result<Self> {
        if !options.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            || options.name.is_empty()
            || options.name.len() > 30
        {
            bail!("cluster name {:?}: use 1 to 30 of a-z, 0-9 and '-'", options.name);
        }
        if options.etcd == 3 && options.nodes < 2 {
            bail!("--etcd 3 needs two nodes beside the master; use --etcd 1 with --nodes {}", options.nodes);
        }
        std::fs::create_dir_all(&options.data_dir)
            .with_context(|| format!("cannot create the data directory {}", options.data_dir.display()))?;
        let root = std::fs::canonicalize(&options.data_dir)
            .with_context(|| format!("cannot resolve {}", options.data_dir.display()))?;
        let mut bins = BTreeMap::new();
        for name in COMPONENTS {
            let chosen = options.bins.iter().rev().find(|(n, _)| n == name).map(|(_, path)| path.clone());
            bins.insert(name.to_owned(), chosen.map_or_else(|| find_program(name), Ok)?);
        }
        let mut flags: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, text) in &options.flags {
            flags.entry(name.clone()).or_default().extend(text.split_whitespace().map(str::to_owned));
        }
        let images = options
            .images
            .iter()
            .map(|path| std::fs::canonicalize(path).with_context(|| format!("--images {}", path.display())))
            .collect::<Result<_>>()?;
        Ok(Self {
            data_dir: root.join(&options.name),
            name: options.name.clone(),
            workers: options.nodes,
            etcd_members: options.etcd,
            flannel_backend: options.flannel_backend,
            proxy_mode: options.proxy_mode,
            api_port: free_port(options.port)?,
            bins,
            images,
            flags,
            registry_mirror: options.registry_mirror.clone(),
            cgroups: cgroups::version(),
        })
    }

    pub fn load(data_dir: &Path) -> Result<Self> {
        let file = data_dir.join("cluster.json");
        let text = std::fs::read(&file)
            .with_context(|| format!("there is no cluster in {}: hack/up makes one", data_dir.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", file.display()))
    }

    pub fn save(&self) -> Result<()> {
        let file = self.data_dir.join("cluster.json");
        let text = serde_json::to_vec_pretty(self).context("cannot encode the cluster's plan")?;
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    pub fn nodes(&self) -> Vec<Node> {
        (0..=self.workers)
            .map(|i| Node {
                name: if i == 0 { MASTER.to_owned() } else { format!("node{i}") },
                ip: Ipv4Addr::new(10, 99, 0, 10 + i),
                runs_etcd: i < self.etcd_members,
            })
            .collect()
    }

    pub fn node_names(&self) -> Vec<String> {
        self.nodes().into_iter().map(|n| n.name).collect()
    }

    pub fn master_ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, 0, 10)
    }

    /// The name of a node's (or the fabric's) network namespace on the host.
    pub fn netns(&self, node: &str) -> String {
        format!("{}-{node}", self.name)
    }

    pub fn node_dir(&self, node: &str) -> PathBuf {
        self.data_dir.join("nodes").join(node)
    }

    pub fn pki(&self, file: &str) -> PathBuf {
        self.data_dir.join("pki").join(file)
    }

    /// The administrator's kubeconfig for programs on the host.
    pub fn kubeconfig(&self) -> PathBuf {
        self.data_dir.join("kubeconfig")
    }

    /// The path of a program in [`COMPONENTS`].
    pub fn bin<'a>(&'a self, component: &'a str) -> &'a Path {
        self.bins.get(component).map_or(Path::new(component), PathBuf::as_path)
    }

    /// The registry that nodes ask instead of every other: the user's, or the cluster's own over the given images.
    pub fn mirror(&self) -> Option<String> {
        let own = || (!self.images.is_empty()).then(|| format!("http://{}", self.registry_address()));
        self.registry_mirror.clone().or_else(own)
    }

    /// Where the cluster's own registry listens, if it has one.
    pub fn registry_address(&self) -> SocketAddr {
        SocketAddr::from((self.master_ip(), 5000))
    }

    pub fn api_url(&self) -> String {
        format!("https://{}:6443", self.master_ip())
    }

    pub fn etcd_urls(&self) -> Vec<String> {
        self.nodes().iter().filter(|n| n.runs_etcd).map(|n| format!("http://{}:2379", n.ip)).collect()
    }
}

/// Our own programs lie beside this one; the others come from the system.
fn find_program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the running program")?;
    let beside = own.with_file_name(name);
    if beside.exists() {
        return Ok(beside);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/bin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
        .with_context(|| {
            format!(
                "{name} is neither beside {} nor on the PATH: run hack/up, which builds and installs what is missing",
                own.display()
            )
        })
}

fn free_port(wanted: u16) -> Result<u16> {
    let bind = |port| TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let listener = bind(wanted).or_else(|_| bind(0)).context("no free port on 127.0.0.1")?;
    Ok(listener.local_addr().context("cannot read the listener's port")?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_and_members_are_checked() {
        assert!(parse_bin("kubelett=/bin/true").unwrap_err().contains("is no component"));
        assert_eq!(parse_bin("kubelet=/bin/../bin/sh").unwrap().0, "kubelet");
        assert!(parse_members("2").is_err());
        assert_eq!(parse_flags("etcd=--a=b --c").unwrap(), ("etcd".into(), "--a=b --c".into()));
    }
}

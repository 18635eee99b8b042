//! The programs of each node with their flags and configuration files: what unit files and kubeadm are on real
//! machines. Flags are upstream's, so that upstream's binaries run in our components' place.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::plan::{CLUSTER_DOMAIN, DNS_SERVICE_IP, MASTER, Node, POD_CIDR, Plan, SERVICE_CIDR};
use super::supervisor::{Condition, Unit, write_units};
use crate::images;

const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const SUBNET_FILE: &str = "/run/flannel/subnet.env";
const CNI_BIN_DIR: &str = "/opt/cni/bin";
/// The CNI plugins that Debian's containernetworking-plugins carries and a node needs.
const CNI_PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];
const SYSTEM_CNI_DIRS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// Writes the units and the configuration files of a node.
pub fn prepare(plan: &Plan, node: &Node) -> Result<()> {
    let dir = plan.node_dir(&node.name);
    fs::create_dir_all(dir.join("log")).with_context(|| format!("cannot create {}", dir.display()))?;
    write(&dir, "etc/containerd/config.toml", &containerd_config(plan)?)?;
    if let Some(mirror) = plan.mirror() {
        let text = format!("[host.\"{mirror}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
        write(&dir, "etc/containerd/certs.d/_default/hosts.toml", &text)?;
    }
    write(&dir, "etc/cni/net.d/10-flannel.conflist", &pretty(&cni_config())?)?;
    write(&dir, "etc/kubernetes/kubelet.yaml", &pretty(&kubelet_config(plan, node))?)?;
    write(&dir, "etc/kubernetes/kube-proxy.yaml", &pretty(&proxy_config(plan, node))?)?;
    link_cni_plugins(plan, &dir.join("root").join(&CNI_BIN_DIR[1..]))?;
    let mut units = Vec::new();
    if node.runs_etcd {
        units.push(etcd(plan, node));
    }
    units.extend(runtime(plan));
    if node.name == MASTER {
        units.extend(control_plane(plan));
        if !plan.images.is_empty() && plan.registry_mirror.is_none() {
            units.push(registry(plan)?);
        }
    }
    units.extend(network(plan, node));
    units.push(kubelet(plan, node));
    for unit in &mut units {
        unit.argv.extend(plan.flags.get(&unit.name).into_iter().flatten().cloned());
    }
    write_units(&dir, &units)
}

fn write(node_dir: &Path, path: &str, text: &str) -> Result<()> {
    let file = node_dir.join("root").join(path);
    let parent = file.parent().unwrap_or(node_dir);
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn pretty(value: &serde_json::Value) -> Result<String> {
    serde_json::to_string_pretty(value).context("cannot encode a configuration file")
}

fn unit(name: &str, argv: Vec<String>, after: Vec<Condition>) -> Unit {
    Unit { name: name.to_owned(), argv, env: vec![], after, oneshot: false }
}

fn argv(program: &Path, args: &[String]) -> Vec<String> {
    std::iter::once(program.display().to_string()).chain(args.iter().cloned()).collect()
}

fn api_listening(plan: &Plan) -> Condition {
    Condition::Listening(SocketAddr::new(IpAddr::V4(plan.master_ip()), 6443))
}

fn etcd(plan: &Plan, node: &Node) -> Unit {
    let members: Vec<String> =
        plan.nodes().iter().filter(|n| n.runs_etcd).map(|n| format!("{}=http://{}:2380", n.name, n.ip)).collect();
    let args = [
        format!("--name={}", node.name),
        "--data-dir=/var/lib/etcd".into(),
        format!("--listen-client-urls=http://{}:2379,http://127.0.0.1:2379", node.ip),
        format!("--advertise-client-urls=http://{}:2379", node.ip),
        format!("--listen-peer-urls=http://{}:2380", node.ip),
        format!("--initial-advertise-peer-urls=http://{}:2380", node.ip),
        format!("--initial-cluster={}", members.join(",")),
        format!("--initial-cluster-token={}", plan.name),
        "--logger=zap".into(),
        "--log-level=warn".into(),
    ];
    unit("etcd", argv(plan.bin("etcd"), &args), vec![])
}

/// From where the nodes can pull the images that the cluster was given.
fn registry(plan: &Plan) -> Result<Unit> {
    let own = std::env::current_exe().context("cannot find the running program")?;
    let archives = plan.images.iter().map(|archive| archive.display().to_string());
    let args: Vec<String> =
        ["registry".to_owned(), plan.registry_address().to_string()].into_iter().chain(archives).collect();
    Ok(unit("registry", argv(&own, &args), vec![]))
}

fn control_plane(plan: &Plan) -> Vec<Unit> {
    let pki = |file: &str| plan.pki(file).display().to_string();
    let etcd = Condition::Listening(SocketAddr::from((Ipv4Addr::LOCALHOST, 2379)));
    let apiserver = [
        format!("--advertise-address={}", plan.master_ip()),
        "--secure-port=6443".into(),
        "--allow-privileged=true".into(),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--enable-bootstrap-token-auth=true".into(),
        format!("--client-ca-file={}", pki("ca.crt")),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--etcd-servers={}", plan.etcd_urls().join(",")),
        format!("--kubelet-client-certificate={}", pki("apiserver-kubelet-client.crt")),
        format!("--kubelet-client-key={}", pki("apiserver-kubelet-client.key")),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--service-account-issuer=https://kubernetes.default.svc.{CLUSTER_DOMAIN}"),
        format!("--service-account-jwks-uri=https://kubernetes.default.svc.{CLUSTER_DOMAIN}/openid/v1/jwks"),
        format!("--service-account-key-file={}", pki("sa.pub")),
        format!("--service-account-signing-key-file={}", pki("sa.key")),
        format!("--service-cluster-ip-range={SERVICE_CIDR}"),
        format!("--requestheader-client-ca-file={}", pki("front-proxy-ca.crt")),
        "--requestheader-allowed-names=front-proxy-client".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-username-headers=X-Remote-User".into(),
        format!("--proxy-client-cert-file={}", pki("front-proxy-client.crt")),
        format!("--proxy-client-key-file={}", pki("front-proxy-client.key")),
    ];
    let component = |name: &str| {
        let config = pki(&format!("{name}.conf"));
        [
            format!("--kubeconfig={config}"),
            format!("--authentication-kubeconfig={config}"),
            format!("--authorization-kubeconfig={config}"),
            "--bind-address=127.0.0.1".to_owned(),
        ]
    };
    let mut manager = component("controller-manager").to_vec();
    manager.extend([
        format!("--service-account-private-key-file={}", pki("sa.key")),
        format!("--root-ca-file={}", pki("ca.crt")),
        format!("--cluster-signing-cert-file={}", pki("ca.crt")),
        format!("--cluster-signing-key-file={}", pki("ca.key")),
        format!("--requestheader-client-ca-file={}", pki("front-proxy-ca.crt")),
        "--use-service-account-credentials=true".into(),
        format!("--cluster-cidr={POD_CIDR}"),
        format!("--service-cluster-ip-range={SERVICE_CIDR}"),
        "--controllers=*,bootstrapsigner,tokencleaner".into(),
    ]);
    vec![
        unit("kube-apiserver", argv(plan.bin("kube-apiserver"), &apiserver), vec![etcd]),
        unit("kube-controller-manager", argv(plan.bin("kube-controller-manager"), &manager), vec![api_listening(plan)]),
        unit("kube-scheduler", argv(plan.bin("kube-scheduler"), &component("scheduler")), vec![api_listening(plan)]),
    ]
}

/// containerd, and the images that every node has from the start, since no registry is assumed to be reachable.
fn runtime(plan: &Plan) -> Vec<Unit> {
    let path = std::env::var("PATH").unwrap_or_default();
    let own = plan.bin("containerd").parent().map(|p| p.display().to_string()).unwrap_or_default();
    let mut containerd =
        unit("containerd", argv(plan.bin("containerd"), &["--config=/etc/containerd/config.toml".into()]), vec![]);
    // The shim is looked up on the PATH: the one beside a replaced containerd comes first.
    containerd.env.push(("PATH".into(), format!("{own}:{path}:/usr/sbin:/sbin")));
    let mut units = vec![containerd];
    for (index, archive) in images::archives(plan).into_iter().enumerate() {
        let mut args = vec!["ctr".into(), "--namespace=k8s.io".into(), "images".into(), "import".into()];
        args.push(archive.display().to_string());
        let mut import = unit(&image_unit(index), args, vec![Condition::Exists(CONTAINERD_SOCKET.into())]);
        import.oneshot = true;
        units.push(import);
    }
    units
}

fn image_unit(index: usize) -> String {
    format!("images-{index}")
}

fn network(plan: &Plan, node: &Node) -> Vec<Unit> {
    let endpoints = plan.etcd_urls().join(",");
    let mut units = Vec::new();
    if node.name == MASTER {
        let network = json!({
            "Network": POD_CIDR,
            "SubnetLen": 24,
            "Backend": {"Type": plan.flannel_backend.name()},
        });
        let args = [
            "etcdctl".to_owned(),
            format!("--endpoints={endpoints}"),
            "put".into(),
            "/coreos.com/network/config".into(),
            network.to_string(),
        ];
        let etcd = Condition::Listening(SocketAddr::from((Ipv4Addr::LOCALHOST, 2379)));
        let mut set = unit("flannel-network", args.to_vec(), vec![etcd]);
        set.env.push(("ETCDCTL_API".into(), "3".into()));
        set.oneshot = true;
        units.push(set);
    }
    let flannel = [format!("--etcd-endpoints={endpoints}"), "--iface=eth0".into(), "--ip-masq".into()];
    let etcd = Condition::Listening(SocketAddr::new(IpAddr::V4(plan.master_ip()), 2379));
    units.push(unit("flanneld", argv(plan.bin("flanneld"), &flannel), vec![etcd]));
    let proxy = ["--config=/etc/kubernetes/kube-proxy.yaml".to_owned()];
    units.push(unit("kube-proxy", argv(plan.bin("kube-proxy"), &proxy), vec![api_listening(plan)]));
    units
}

fn kubelet(plan: &Plan, node: &Node) -> Unit {
    let args = [
        "--config=/etc/kubernetes/kubelet.yaml".to_owned(),
        format!("--kubeconfig={}", plan.pki(&format!("kubelet-{}.conf", node.name)).display()),
        format!("--hostname-override={}", node.name),
        format!("--node-ip={}", node.ip),
    ];
    let mut after =
        vec![Condition::Exists(CONTAINERD_SOCKET.into()), Condition::Exists(SUBNET_FILE.into()), api_listening(plan)];
    after.extend((0..images::archives(plan).len()).map(|i| Condition::Done(image_unit(i))));
    unit("kubelet", argv(plan.bin("kubelet"), &args), after)
}

/// containerd 2 has another configuration format than 1.x.
fn containerd_config(plan: &Plan) -> Result<String> {
    let program = plan.bin("containerd");
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {} --version", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let two = text.split_whitespace().any(|word| word.trim_start_matches('v').starts_with("2."));
    let runc = plan.bin("runc").display();
    // Lowering oom_score_adj needs CAP_SYS_RESOURCE; without it and this setting every sandbox fails.
    let shared = "restrict_oom_score_adj = true";
    let pause = images::PAUSE;
    let runtimes = |prefix: &str| -> String {
        ["runc", "test-handler"]
            .iter()
            .map(|name| {
                format!(
                    "  [plugins.\"{prefix}\".containerd.runtimes.{name}]\n    runtime_type = \"io.containerd.runc.v2\"\n    \
                     [plugins.\"{prefix}\".containerd.runtimes.{name}.options]\n      BinaryName = \"{runc}\"\n"
                )
            })
            .collect()
    };
    let (images, runtime) = ("io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime");
    Ok(if two {
        format!(
            "version = 3\n[grpc]\n  address = \"{CONTAINERD_SOCKET}\"\n\
             [plugins.\"{images}\"]\n  snapshotter = \"overlayfs\"\n\
             [plugins.\"{images}\".pinned_images]\n  sandbox = \"{pause}\"\n\
             [plugins.\"{images}\".registry]\n  config_path = \"/etc/containerd/certs.d\"\n\
             [plugins.\"{runtime}\"]\n  {shared}\n\
             [plugins.\"{runtime}\".cni]\n  bin_dirs = [\"{CNI_BIN_DIR}\"]\n  conf_dir = \"/etc/cni/net.d\"\n{}",
            runtimes(runtime)
        )
    } else {
        let cri = "io.containerd.grpc.v1.cri";
        format!(
            "version = 2\n[grpc]\n  address = \"{CONTAINERD_SOCKET}\"\n\
             [plugins.\"{cri}\"]\n  {shared}\n  sandbox_image = \"{pause}\"\n\
             [plugins.\"{cri}\".registry]\n  config_path = \"/etc/containerd/certs.d\"\n\
             [plugins.\"{cri}\".cni]\n  bin_dir = \"{CNI_BIN_DIR}\"\n  conf_dir = \"/etc/cni/net.d\"\n\
             [plugins.\"{cri}\".containerd]\n  snapshotter = \"overlayfs\"\n  default_runtime_name = \"runc\"\n{}",
            runtimes(cri)
        )
    })
}

fn cni_config() -> serde_json::Value {
    json!({
        "name": "cbr0",
        "cniVersion": "0.4.0",
        "plugins": [
            {"type": "flannel", "delegate": {"hairpinMode": true, "isDefaultGateway": true}},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn kubelet_config(plan: &Plan, node: &Node) -> serde_json::Value {
    let serving = |suffix: &str| plan.pki(&format!("kubelet-{}-serving.{suffix}", node.name));
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": plan.pki("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": serving("crt"),
        "tlsPrivateKeyFile": serving("key"),
        "clusterDomain": CLUSTER_DOMAIN,
        "clusterDNS": [DNS_SERVICE_IP],
        "resolvConf": "/etc/resolv.conf",
        "staticPodPath": "/etc/kubernetes/manifests",
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD_SOCKET}"),
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": false,
        "failSwapOn": false,
        "oomScoreAdj": 0,
        "maxOpenFiles": open_files_limit(),
        "serializeImagePulls": false,
        "registryPullQPS": 0,
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        // Nodes share the machine's disk and memory, so that only a nearly full machine may evict.
        "evictionHard": {
            "memory.available": "200Mi", "nodefs.available": "2%", "imagefs.available": "2%", "nodefs.inodesFree": "1%",
        },
    });
    if node.name == MASTER {
        config["registerWithTaints"] =
            json!([{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]);
    }
    config
}

fn open_files_limit() -> u64 {
    nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .map_or(20_000, |(_, hard)| hard.min(1_000_000))
}

fn proxy_config(plan: &Plan, node: &Node) -> serde_json::Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": plan.pki("kube-proxy.conf")},
        "clusterCIDR": POD_CIDR,
        "mode": plan.proxy_mode.name(),
        "hostnameOverride": node.name,
        // The connection-tracking limits belong to the whole machine and cannot be set from a node.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

fn link_cni_plugins(plan: &Plan, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut links: Vec<(String, PathBuf)> = vec![("flannel".into(), plan.bin("flannel").to_owned())];
    for plugin in CNI_PLUGINS {
        let path =
            SYSTEM_CNI_DIRS.iter().map(|dir| Path::new(dir).join(plugin)).find(|path| path.exists()).with_context(
                || format!("CNI plugin {plugin} is missing (apt-get install containernetworking-plugins)"),
            )?;
        // Copied: /opt/cni is the node's own, so that a link into it would lead nowhere.
        links.push((plugin.into(), fs::canonicalize(path).context("cannot resolve a CNI plugin")?));
    }
    for (name, source) in links {
        let target = dir.join(&name);
        fs::copy(&source, &target)
            .with_context(|| format!("cannot copy {} to {}", source.display(), target.display()))?;
    }
    Ok(())
}

//! The node's programs are killed at random moments of pods' lives: the kubelet, containerd, the shim of a pod. However
//! often that happens, pods become what they should be, containers that ran go on running (unless their own shim was
//! killed), and what is deleted leaves nothing behind. Run alone; it prints the seed, by which a run can be repeated.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ketch_test::{Cluster, Namespace, check, is_ready, poll, text};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

const NODE: &str = "node1";
/// Pods that may exist at the same time.
const SLOTS: usize = 6;
/// The state of the node is checked after so many kills.
const ROUNDS_PER_CHECK: usize = 5;
/// A kill comes at most so long after the last change: longer than a pod takes to start or to stop.
const MOMENTS: Duration = Duration::from_millis(1500);
/// For everything to become as it should be after a few kills, on a machine that may be busy.
const CONVERGE: Duration = Duration::from_secs(180);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

/// A pod with something of everything that a kubelet has to make and to clear away.
fn manifest(name: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{app: kills}}}}, spec: {{nodeName: {NODE}, \
         terminationGracePeriodSeconds: 1, \
         volumes: [{{name: mem, emptyDir: {{medium: Memory}}}}, {{name: disk, emptyDir: {{}}}}, \
         {{name: conf, configMap: {{name: conf}}}}, {{name: key, secret: {{secretName: key}}}}], \
         initContainers: [{{name: first, image: 'ketch.local/demo:1', command: [sh, -c, 'echo x > /disk/x'], \
         volumeMounts: [{{name: disk, mountPath: /disk}}]}}], \
         containers: [{{name: main, image: 'ketch.local/demo:1', command: [sleep, '10000'], \
         readinessProbe: {{exec: {{command: [cat, /disk/x]}}, periodSeconds: 1}}, \
         volumeMounts: [{{name: mem, mountPath: /mem}}, {{name: disk, mountPath: /disk}}, \
         {{name: conf, mountPath: /conf/a, subPath: a}}, {{name: key, mountPath: /key}}]}}, \
         {{name: second, image: 'ketch.local/demo:1', command: [sleep, '10000']}}]}}}}"
    )
}

struct Kills<'a> {
    cluster: &'a Cluster,
    ns: &'a Namespace<'a>,
    random: StdRng,
    /// Names of the pods that should be there.
    wanted: BTreeSet<String>,
    next: usize,
    /// Pods whose shim was killed since the last check.
    hit: BTreeSet<String>,
    /// Those of the time before it: at a check the end of a shim may not have been noticed yet.
    hit_before: BTreeSet<String>,
    /// The containers that ran at the last check, by pod.
    ran: BTreeMap<String, Value>,
}

impl Kills<'_> {
    /// Creates or deletes a pod, or leaves all as it is.
    fn change(&mut self) {
        match self.random.random_range(0..4) {
            0 | 1 if self.wanted.len() < SLOTS => {
                let name = format!("p{}", self.next);
                self.next += 1;
                self.ns.create(&manifest(&name));
                self.wanted.insert(name);
            }
            2 if !self.wanted.is_empty() => {
                let index = self.random.random_range(0..self.wanted.len());
                let name = self.wanted.iter().nth(index).cloned().expect("the index is in range");
                self.ns.kubectl(&["delete", "pod", &name, "--wait=false"]);
                self.wanted.remove(&name);
                self.ran.remove(&name);
            }
            _ => {}
        }
    }

    fn kill(&mut self) {
        match self.random.random_range(0..3) {
            0 => self.kill_unit("kubelet"),
            1 => self.kill_unit("containerd"),
            _ => self.kill_shim(),
        }
    }

    fn kill_unit(&self, unit: &str) {
        // It may be down from the kill before: then this one has nothing to do.
        let running = self.cluster.unit(NODE, "list", "");
        let line = running.lines().find(|line| line.split_whitespace().next() == Some(unit)).unwrap_or_default();
        if line.contains("running") {
            self.cluster.unit(NODE, "kill", unit);
        }
    }

    /// Kills the shim of one of the pods, if there is one at this moment.
    fn kill_shim(&mut self) {
        let script = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2> /dev/null | grep -q '^[^ ]*containerd-shim' \
                      && echo ${p#/proc/} $(tr '\\0' ' ' < $p/cmdline); done; true";
        let listing = self.cluster.in_node(NODE, &["sh", "-c", script]).expect("processes can be listed");
        let sandboxes = self.sandboxes();
        let shims: Vec<(&str, &String)> = listing
            .lines()
            .filter_map(|line| {
                let pod = sandboxes.iter().find(|(id, _)| line.contains(id.as_str()))?.1;
                Some((line.split_whitespace().next()?, pod))
            })
            .collect();
        if shims.is_empty() {
            return;
        }
        let (pid, pod) = shims[self.random.random_range(0..shims.len())];
        self.hit.insert(pod.clone());
        // It may have ended since.
        let _ = self.cluster.in_node(NODE, &["kill", "-9", pid]);
    }

    /// Sandboxes of the test's pods and the names of these; none while containerd is down.
    fn sandboxes(&self) -> BTreeMap<String, String> {
        let filter = format!(
            "labels.\"io.kubernetes.pod.namespace\"=={},labels.\"io.cri-containerd.kind\"==sandbox",
            self.ns.name
        );
        let listing = self.cluster.in_node(NODE, &["ctr", "-n", "k8s.io", "containers", "list", "-q", &filter]);
        let ids = listing.unwrap_or_default();
        ids.lines()
            .filter_map(|id| {
                let info = self.cluster.in_node(NODE, &["ctr", "-n", "k8s.io", "containers", "info", id]).ok()?;
                let info: Value = serde_json::from_str(&info).ok()?;
                Some((id.to_owned(), text(&info["Labels"]["io.kubernetes.pod.name"])))
            })
            .collect()
    }

    /// Everything is as it should be, and what ran and was not hit still runs.
    fn check(&mut self) {
        let pods = poll("the wanted pods are Ready and no others are there", CONVERGE, || {
            let list = self.ns.try_get(&["pods", "-l", "app=kills"])?;
            let pods = list["items"].as_array().cloned().unwrap_or_default();
            let names: BTreeSet<String> = pods.iter().map(|pod| text(&pod["metadata"]["name"])).collect();
            check(names == self.wanted, || format!("wanted {:?}, there are {names:?}", self.wanted))?;
            let unready: Vec<_> =
                pods.iter().filter(|pod| !is_ready(pod)).map(|pod| pod["status"].to_string()).collect();
            check(unready.is_empty(), || unready.join("\n"))?;
            Ok(pods)
        });
        let mut ran = BTreeMap::new();
        for pod in pods {
            let name = text(&pod["metadata"]["name"]);
            let statuses = pod["status"]["containerStatuses"].as_array().into_iter().flatten();
            let ids: Value = statuses.map(|status| status["containerID"].clone()).collect();
            let was_hit = self.hit.contains(&name) || self.hit_before.contains(&name);
            if let Some(before) = self.ran.get(&name).filter(|_| !was_hit) {
                assert_eq!(*before, ids, "containers of {name} were replaced: {}", pod["status"]);
            }
            ran.insert(name, ids);
        }
        self.ran = ran;
        self.hit_before = std::mem::take(&mut self.hit);
    }

    /// What still carries the name of the test's namespace.
    fn leftovers(&self) -> Result<String, String> {
        let script = format!(
            "ctr -n k8s.io containers list -q 'labels.\"io.kubernetes.pod.namespace\"=={ns}' | sed 's/^/container /'; \
             for d in /var/log/pods/{ns}_*; do [ ! -e $d ] || echo directory $d; done",
            ns = self.ns.name
        );
        self.cluster.in_node(NODE, &["sh", "-c", &script])
    }

    /// How many there are on the node of what every pod has, whoever it belongs to.
    fn census(&self) -> Result<String, String> {
        let script = "echo directories $(ls /var/lib/kubelet/pods | wc -l); \
             echo mounts $(grep -c ' /var/lib/kubelet/pods/' /proc/self/mountinfo); \
             echo namespaces $(ls /run/netns | wc -l); \
             echo cgroups $(find /sys/fs/cgroup -path '*kubepods*' -type d -name 'pod*' | wc -l); \
             echo shims $(ps -e -o comm | grep -c '^containerd-shim')";
        self.cluster.in_node(NODE, &["sh", "-c", script])
    }
}

#[test]
#[ignore = "needs a cluster (hack/test)"]
fn killed_at_random_pods_converge_and_nothing_is_left() {
    let cluster = Cluster::from_env();
    let ns = cluster.namespace("kills");
    ns.kubectl(&["create", "configmap", "conf", "--from-literal=a=1"]);
    ns.kubectl(&["create", "secret", "generic", "key", "--from-literal=k=s"]);
    let (rounds, seed) = (number("KETCH_KILL_ROUNDS", 200), number("KETCH_KILL_SEED", rand::random()));
    println!("{rounds} rounds, KETCH_KILL_SEED={seed}");
    let mut kills = Kills {
        cluster: &cluster,
        ns: &ns,
        random: StdRng::seed_from_u64(seed),
        wanted: BTreeSet::new(),
        next: 0,
        hit: BTreeSet::new(),
        hit_before: BTreeSet::new(),
        ran: BTreeMap::new(),
    };
    let before = kills.census().expect("the node can be looked at");
    let begun = Instant::now();
    for round in 1..=rounds {
        kills.change();
        let moment = kills.random.random_range(Duration::ZERO..MOMENTS);
        std::thread::park_timeout(moment);
        kills.kill();
        if round % ROUNDS_PER_CHECK as u64 == 0 || round == rounds {
            kills.check();
            println!("round {round}: {} pods, {} s", kills.wanted.len(), begun.elapsed().as_secs());
        }
    }
    for name in std::mem::take(&mut kills.wanted) {
        ns.kubectl(&["delete", "pod", &name, "--wait=false"]);
    }
    kills.ran.clear();
    kills.check();
    poll("nothing is left of the pods", CONVERGE, || {
        let left = kills.leftovers()?;
        check(left.is_empty(), || left)?;
        let now = kills.census()?;
        check(now == before, || format!("before:\n{before}\nnow:\n{now}"))
    });
}

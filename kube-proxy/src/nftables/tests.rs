//! Packets through tables that the backend made in the fake kernel, and what it takes to change those tables.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::backend::Backend;
use super::chains::{LocalTraffic, Settings};
use super::fake::{FakeKernel, FakeTable};
use super::schema::{Element, Front};
use super::trace::{Outcome, Packet, outcomes, trace};
use crate::model::{Endpoint, Family, Protocol, Service, ServiceName};
use crate::plan::testing::{endpoint, planned, service};
use crate::plan::{Changed, Plans, ServicePlan};

const POD: &str = "10.244.1.9";
const NODE: &str = "10.99.0.2";
const OUTSIDE: &str = "203.0.113.7";

fn settings() -> Settings {
    Settings {
        family: Family::Ipv4,
        mark: 0x4000,
        masquerade_all: false,
        local_traffic: LocalTraffic::Network("10.244.0.0/16".parse().unwrap()),
        node_port_addresses: None,
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn packet(source: &str, destination: &str, port: u16) -> Packet {
    Packet {
        source: ip(source),
        destination: ip(destination),
        protocol: Protocol::Tcp,
        port,
        interface: "eth0",
        from_node: source == NODE,
        to_node: destination == NODE,
    }
}

fn http() -> Service {
    service("10.96.0.1", &[("http", Protocol::Tcp, 80, Some(30080))])
}

fn both() -> Vec<Endpoint> {
    vec![endpoint("10.244.1.2", "node1"), endpoint("10.244.2.2", "node2")]
}

fn name(name: &str) -> ServiceName {
    ServiceName::new("ns", name)
}

/// A backend with a fake kernel, and the plans.
struct Lab {
    settings: Settings,
    backend: Backend<FakeKernel>,
    plans: Plans,
}

impl Lab {
    fn new(settings: Settings) -> Self {
        let mut lab = Self { settings, backend: Backend::new(FakeKernel::default()), plans: Plans::new() };
        lab.sync(Vec::new());
        lab
    }

    fn sync(&mut self, changed: Vec<Changed>) {
        self.backend.sync(&self.settings, &mut self.plans, &changed).unwrap();
    }

    fn put(&mut self, name: &ServiceName, mut plan: ServicePlan) {
        let old = self.plans.get(name).cloned().unwrap_or_default();
        plan.keep_places_of(&old);
        self.plans.insert(name.clone(), plan);
        self.sync(vec![Changed { name: name.clone(), old }]);
    }

    fn remove(&mut self, name: &ServiceName) {
        let old = self.plans.remove(name).unwrap();
        self.sync(vec![Changed { name: name.clone(), old }]);
    }

    fn kernel(&mut self) -> &mut FakeKernel {
        self.backend.kernel()
    }

    fn table(&mut self) -> FakeTable {
        let family = self.settings.family;
        self.kernel().tables[&family].clone()
    }

    /// Operations of the transactions since `mark`.
    fn operations_since(&mut self, mark: usize) -> Vec<usize> {
        self.kernel().transactions[mark..].to_vec()
    }

    fn mark(&mut self) -> usize {
        self.kernel().transactions.len()
    }
}

fn run_with(settings: Settings, service: Service, endpoints: Vec<Endpoint>, packet: Packet) -> BTreeSet<Outcome> {
    let mut lab = Lab::new(settings);
    lab.put(&name("svc"), planned(service, endpoints));
    outcomes(&lab.table(), packet)
}

fn run(service: Service, endpoints: Vec<Endpoint>, packet: Packet) -> BTreeSet<Outcome> {
    run_with(settings(), service, endpoints, packet)
}

fn to(addresses: &[&str], masqueraded: bool) -> BTreeSet<Outcome> {
    addresses.iter().map(|address| Outcome::Forwarded { to: ip(address), port: 8080, masqueraded }).collect()
}

fn only(outcome: Outcome) -> BTreeSet<Outcome> {
    [outcome].into()
}

const ALL: [&str; 2] = ["10.244.1.2", "10.244.2.2"];

#[test]
fn cluster_ip() {
    assert_eq!(run(http(), both(), packet(POD, "10.96.0.1", 80)), to(&ALL, false));
    assert_eq!(run(http(), both(), packet(NODE, "10.96.0.1", 80)), to(&ALL, true));
    assert_eq!(run(http(), both(), packet(OUTSIDE, "10.96.0.1", 80)), to(&ALL, true));
    // An endpoint that reaches itself must not see its own address as the client.
    let alone = vec![both().remove(0)];
    assert_eq!(run(http(), alone, packet("10.244.1.2", "10.96.0.1", 80)), to(&["10.244.1.2"], true));
    assert_eq!(run(http(), both(), packet(POD, "10.96.0.1", 81)), only(Outcome::Rejected));
    assert_eq!(run(http(), vec![], packet(POD, "10.96.0.1", 80)), only(Outcome::Rejected));
    assert_eq!(run(http(), both(), packet(POD, "192.0.2.99", 80)), only(Outcome::Untouched));
    let udp = Packet { protocol: Protocol::Udp, ..packet(POD, "10.96.0.1", 80) };
    assert_eq!(run(http(), both(), udp), only(Outcome::Rejected));
}

#[test]
fn ipv6() {
    let six = || service("fd00::1", &[("", Protocol::Sctp, 80, Some(30080))]);
    let endpoints = || vec![endpoint("fd01::2", "node1"), endpoint("fd01:1::2", "node2")];
    let settings = Settings {
        family: Family::Ipv6,
        local_traffic: LocalTraffic::Network("fd01::/16".parse().unwrap()),
        ..settings()
    };
    let packet =
        |source: &str, destination: &str| Packet { protocol: Protocol::Sctp, ..packet(source, destination, 80) };
    let mut sticky = six();
    sticky.affinity = Some(60);
    for service in [six(), sticky] {
        let run = |packet| run_with(settings.clone(), service.clone(), endpoints(), packet);
        assert_eq!(run(packet("fd01::9", "fd00::1")), to(&["fd01::2", "fd01:1::2"], false));
        let node_port = Packet { port: 30080, to_node: true, ..packet("2001:db8::1", "2001:db8::2") };
        assert_eq!(run(node_port), to(&["fd01::2", "fd01:1::2"], true));
        let loopback = Packet { destination: ip("::1"), ..node_port };
        assert_eq!(run(loopback), only(Outcome::Untouched));
    }
}

#[test]
fn node_port() {
    assert_eq!(run(http(), both(), packet(OUTSIDE, NODE, 30080)), to(&ALL, true));
    assert_eq!(run(http(), both(), packet(OUTSIDE, NODE, 30081)), only(Outcome::Untouched));
    assert_eq!(run(http(), vec![], packet(OUTSIDE, NODE, 30080)), only(Outcome::Rejected));
    let loopback = Packet { to_node: true, ..packet(NODE, "127.0.0.1", 30080) };
    assert_eq!(run(http(), both(), loopback), only(Outcome::Untouched));
}

#[test]
fn node_port_on_chosen_addresses_only() {
    let chosen = Settings { node_port_addresses: Some(vec![ip(NODE), ip("127.0.0.1")]), ..settings() };
    let run = |packet| run_with(chosen.clone(), http(), both(), packet);
    assert_eq!(run(packet(OUTSIDE, NODE, 30080)), to(&ALL, true));
    for other in ["10.98.0.2", "127.0.0.1"] {
        assert_eq!(run(Packet { to_node: true, ..packet(OUTSIDE, other, 30080) }), only(Outcome::Untouched));
    }
}

#[test]
fn masquerading_by_configuration() {
    let with = |local_traffic, masquerade_all| Settings { local_traffic, masquerade_all, ..settings() };
    let pod = |interface| Packet { interface, ..packet(POD, "10.96.0.1", 80) };
    for (settings, interface, masqueraded) in [
        (with(LocalTraffic::Unknown, false), "eth0", false),
        (with(LocalTraffic::Unknown, true), "eth0", true),
        (with(LocalTraffic::Interface("cni0".to_owned()), false), "cni0", false),
        (with(LocalTraffic::Interface("cni0".to_owned()), false), "cni01", true),
        (with(LocalTraffic::InterfacePrefix("veth".to_owned()), false), "veth123", false),
        (with(LocalTraffic::InterfacePrefix("veth".to_owned()), false), "eth0", true),
    ] {
        assert_eq!(run_with(settings.clone(), http(), both(), pod(interface)), to(&ALL, masqueraded), "{settings:?}");
    }
}

#[test]
fn external_policy_local_keeps_the_client_address() {
    let mut local = http();
    local.external_local = true;
    assert_eq!(run(local.clone(), both(), packet(OUTSIDE, NODE, 30080)), to(&["10.244.1.2"], false));
    assert_eq!(run(local.clone(), both(), packet(POD, NODE, 30080)), to(&ALL, false));
    assert_eq!(run(local.clone(), both(), packet(NODE, NODE, 30080)), to(&ALL, true));
    let away = vec![endpoint("10.244.2.2", "node2")];
    assert_eq!(run(local.clone(), away.clone(), packet(OUTSIDE, NODE, 30080)), only(Outcome::Dropped));
    assert_eq!(run(local, away, packet(POD, "10.96.0.1", 80)), to(&["10.244.2.2"], false));
}

#[test]
fn internal_policy_local() {
    let mut local = http();
    local.internal_local = true;
    assert_eq!(run(local.clone(), both(), packet(POD, "10.96.0.1", 80)), to(&["10.244.1.2"], false));
    let away = vec![endpoint("10.244.2.2", "node2")];
    assert_eq!(run(local.clone(), away.clone(), packet(POD, "10.96.0.1", 80)), only(Outcome::Dropped));
    assert_eq!(run(local, away, packet(OUTSIDE, NODE, 30080)), to(&["10.244.2.2"], true));
}

#[test]
fn external_and_load_balancer_addresses() {
    let mut public = http();
    public.external_ips = vec![ip("198.51.100.1")];
    public.load_balancer_ips = vec![ip("198.51.100.2")];
    public.source_ranges = Some(vec!["203.0.113.0/25".parse().unwrap(), "203.0.113.128/25".parse().unwrap()]);
    let run = |packet| run(public.clone(), both(), packet);
    assert_eq!(run(packet(OUTSIDE, "198.51.100.1", 80)), to(&ALL, true));
    assert_eq!(run(packet(OUTSIDE, "198.51.100.2", 80)), to(&ALL, true));
    assert_eq!(run(packet("8.8.8.8", "198.51.100.2", 80)), only(Outcome::Dropped));
    assert_eq!(run(packet("198.51.100.2", "198.51.100.2", 80)), to(&ALL, true), "the node behind its own balancer");
    assert_eq!(run(packet("8.8.8.8", "198.51.100.1", 80)), to(&ALL, true));
}

#[test]
fn clients_stay_as_long_as_their_endpoint_does() {
    let mut sticky = http();
    sticky.affinity = Some(60);
    let mut lab = Lab::new(settings());
    lab.put(&name("svc"), planned(sticky.clone(), both()));
    let mut table = lab.table();
    let client = packet(POD, "10.96.0.1", 80);
    let first = trace(&mut table, client, 0);
    assert_eq!(outcomes(&table, client), only(first.clone()));
    assert_eq!(outcomes(&table, packet("10.244.1.10", "10.96.0.1", 80)), to(&ALL, false), "others are free");

    // The endpoint leaves: the client goes to the other, and stays there.
    lab.kernel().tables.insert(Family::Ipv4, table);
    let left = if first == (Outcome::Forwarded { to: ip(ALL[0]), port: 8080, masqueraded: false }) { 0 } else { 1 };
    let mut endpoints = both();
    endpoints.remove(left);
    lab.put(&name("svc"), planned(sticky, endpoints));
    assert_eq!(outcomes(&lab.table(), client), to(&[ALL[1 - left]], false));
}

#[test]
fn one_endpoint_more_or_less_is_a_few_operations() {
    let mut lab = Lab::new(settings());
    for number in 0..50 {
        let service = service(&format!("10.96.1.{number}"), &[("", Protocol::Tcp, 80, None)]);
        lab.put(&name(&format!("svc{number}")), planned(service, both()));
    }
    let svc = |endpoints| planned(service("10.96.1.7", &[("", Protocol::Tcp, 80, None)]), endpoints);
    let three = || [both(), vec![endpoint("10.244.2.3", "node2")]].concat();
    lab.put(&name("svc7"), svc(three()));
    let mark = lab.mark();
    lab.put(&name("svc7"), svc(both()));
    // The place goes, and the chain of the service is another.
    assert_eq!(lab.operations_since(mark), [3]);
    let mark = lab.mark();
    lab.put(&name("svc7"), svc(vec![both().remove(0), endpoint("10.244.2.9", "node2")]));
    assert_eq!(lab.operations_since(mark), [2], "one place has somebody else");
    let mark = lab.mark();
    lab.put(&name("svc7"), svc(vec![both().remove(0), endpoint("10.244.2.9", "node2")]));
    assert_eq!(lab.operations_since(mark), [] as [usize; 0]);
}

#[test]
fn a_new_process_finds_everything_in_place() {
    let mut lab = Lab::new(settings());
    let mut sticky = http();
    sticky.affinity = Some(60);
    sticky.load_balancer_ips = vec![ip("198.51.100.2")];
    sticky.source_ranges = Some(vec!["203.0.113.0/24".parse().unwrap()]);
    lab.put(&name("a"), planned(sticky, both()));
    // An order that only history explains.
    let other = |last: &[u8]| {
        let endpoints = last.iter().map(|last| endpoint(&format!("10.244.2.{last}"), "node2")).collect();
        planned(service("10.96.0.2", &[("", Protocol::Udp, 53, None)]), endpoints)
    };
    lab.put(&name("b"), other(&[1, 2, 3, 4]));
    lab.put(&name("b"), other(&[2, 3, 4, 5]));
    lab.put(&name("b"), other(&[3, 4, 5]));
    let before = lab.table();
    let mut kernel = std::mem::take(lab.kernel());
    kernel.transactions.clear();
    let mut new = Lab { settings: settings(), backend: Backend::new(kernel), plans: Plans::new() };
    new.plans = lab.plans.clone();
    new.plans.insert(name("b"), other(&[3, 4, 5]));
    new.sync(Vec::new());
    // The chains for one and for four endpoints are not needed any more; everything else is as it was.
    assert_eq!(new.operations_since(0).len(), 1);
    assert_eq!(
        new.table().sets.get(&super::schema::SetName::ClusterEndpoints),
        before.sets.get(&super::schema::SetName::ClusterEndpoints)
    );
    let mark = new.mark();
    assert_eq!(new.backend.verify(&[settings()], &mut new.plans).unwrap(), 0);
    assert_eq!(new.operations_since(mark), [] as [usize; 0]);
}

#[test]
fn what_others_change_is_put_right() {
    let mut lab = Lab::new(settings());
    lab.put(&name("a"), planned(http(), both()));
    let verify = |lab: &mut Lab| lab.backend.verify(&[settings()], &mut lab.plans).unwrap();
    verify(&mut lab);
    let wanted = lab.table();
    let damage: [fn(&mut FakeTable); 4] = [
        |table| drop(table.sets.values_mut().map(std::collections::BTreeMap::clear).collect::<Vec<_>>()),
        |table| table.chains.values_mut().for_each(|chain| chain.rules.clear()),
        |table| drop(table.sets.remove(&super::schema::SetName::Hairpins)),
        |table| {
            table
                .chains
                .values_mut()
                .filter(|chain| chain.name == "services")
                .for_each(|chain| chain.hook = wanted_hook())
        },
    ];
    for damage in damage {
        let kernel = lab.kernel();
        damage(kernel.tables.get_mut(&Family::Ipv4).unwrap());
        kernel.generation += 1;
        assert!(verify(&mut lab) > 0);
        assert_eq!(lab.table(), wanted);
        assert_eq!(verify(&mut lab), 0);
    }
    lab.kernel().tables.clear();
    lab.kernel().generation += 1;
    verify(&mut lab);
    assert_eq!(lab.table(), wanted);
}

fn wanted_hook() -> Option<super::chains::Hook> {
    let point = super::chains::HookPoint::Prerouting;
    Some(super::chains::Hook { kind: "nat", point, priority: 7 })
}

#[test]
fn two_services_that_claim_one_address_do_not_disturb_others() {
    let claim = |cluster_ip: &str| {
        let mut service = service(cluster_ip, &[("", Protocol::Tcp, 80, None)]);
        service.external_ips = vec![ip("198.51.100.1")];
        service
    };
    let mut lab = Lab::new(settings());
    lab.put(&name("first"), planned(claim("10.96.0.1"), vec![both().remove(0)]));
    lab.put(&name("second"), planned(claim("10.96.0.2"), vec![both().remove(1)]));
    let external = packet(OUTSIDE, "198.51.100.1", 80);
    assert_eq!(outcomes(&lab.table(), external), to(&["10.244.1.2"], true));
    assert_eq!(outcomes(&lab.table(), packet(POD, "10.96.0.2", 80)), to(&["10.244.2.2"], false));
    lab.remove(&name("first"));
    assert_eq!(outcomes(&lab.table(), external), to(&["10.244.2.2"], true), "the second may now");
    lab.remove(&name("second"));
    assert_eq!(outcomes(&lab.table(), external), only(Outcome::Untouched));
}

#[test]
fn a_service_that_the_kernel_refuses_does_not_hold_others_up() {
    let mut lab = Lab::new(settings());
    lab.kernel().poison = Some(Element::Refused(Front::Address(ip("10.96.0.9"), Protocol::Tcp, 80)));
    let bad = planned(service("10.96.0.9", &[("", Protocol::Tcp, 80, None)]), vec![]);
    let changed = ["bad", "good"].map(|text| Changed { name: name(text), old: ServicePlan::default() });
    lab.plans = [(name("bad"), bad), (name("good"), planned(http(), both()))].into();
    for _ in 0..2 {
        let error = lab.backend.sync(&settings(), &mut lab.plans, &changed).unwrap_err();
        assert!(error.to_string().contains("ns/bad"), "{error}");
        assert_eq!(outcomes(&lab.table(), packet(POD, "10.96.0.1", 80)), to(&ALL, false));
    }
    lab.kernel().poison = None;
    lab.backend.sync(&settings(), &mut lab.plans, &[]).unwrap();
    assert_eq!(outcomes(&lab.table(), packet(POD, "10.96.0.9", 80)), only(Outcome::Rejected));
}

/// Whatever happened before, the table is what it would be if it had been made from the plans at once; but for the
/// order of endpoints, and classes that wait for their end.
#[test]
fn history_leaves_no_traces() {
    let mut lab = Lab::new(settings());
    let mut random = 12345_u32;
    let mut next = |below: u32| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 8) % below
    };
    for _ in 0..400 {
        let number = next(6);
        let which = name(&format!("svc{number}"));
        if next(5) == 0 && lab.plans.contains_key(&which) {
            lab.remove(&which);
            continue;
        }
        let mut service =
            service(&format!("10.96.0.{number}"), &[("", Protocol::Tcp, 80, Some(30000 + number as u16 / 2))]);
        service.external_local = next(2) == 0;
        service.internal_local = next(2) == 0;
        service.affinity = [None, Some(10), Some(20)][next(3) as usize];
        service.external_ips = vec![ip(&format!("198.51.100.{}", next(3)))];
        service.load_balancer_ips = vec![ip(&format!("198.51.101.{}", next(3)))];
        service.source_ranges = (next(2) == 0).then(|| vec!["203.0.113.0/24".parse().unwrap()]);
        let count = next(5);
        let endpoints = (0..count)
            .map(|_| endpoint(&format!("10.244.{}.{}", next(2) + 1, next(4)), ["node1", "node2"][next(2) as usize]));
        let endpoints = endpoints.collect();
        lab.put(&which, planned(service, endpoints));
    }
    let names: Vec<ServiceName> = lab.plans.keys().cloned().collect();
    for name in names {
        lab.remove(&name);
    }
    lab.backend.verify(&[settings()], &mut lab.plans).unwrap();
    lab.backend.verify(&[settings()], &mut lab.plans).unwrap();
    let empty = Lab::new(settings()).table();
    assert_eq!(lab.table(), empty);
}

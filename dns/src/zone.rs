//! Answers for the cluster's domain and for the addresses of its services. Pure: a model and a question in, an
//! answer out.

use std::collections::BTreeSet;
use std::net::IpAddr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::model::{Endpoint, Kind, Model, Port, Service, Slice};

/// Seconds that clients may keep an answer, positive or negative.
pub const TTL: u32 = 5;
/// The version of the specification that is followed; `dns-version` answers with it.
const SPECIFICATION: &str = "1.1.0";
const SRV_WEIGHT: u16 = 100;

/// What is said about a name of ours.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub code: ResponseCode,
    pub records: Vec<Record>,
    pub additionals: Vec<Record>,
    /// The name that the last record leads to and that is not of our zone: to be resolved elsewhere.
    pub follow: Option<Name>,
}

impl Answer {
    fn new(records: Vec<Record>) -> Self {
        Self { code: ResponseCode::NoError, records, additionals: Vec::new(), follow: None }
    }

    /// The name exists, but has nothing of the wanted type.
    fn nothing() -> Self {
        Self::new(Vec::new())
    }

    fn no_name() -> Self {
        Self { code: ResponseCode::NXDomain, ..Self::nothing() }
    }

    fn exists(exists: bool) -> Self {
        if exists { Self::nothing() } else { Self::no_name() }
    }
}

/// The cluster's domain.
#[derive(Clone, Debug)]
pub struct Zone {
    origin: Name,
}

impl Zone {
    /// `origin` is `cluster.local.` or alike, lower case and complete.
    pub fn new(origin: Name) -> Self {
        Self { origin }
    }

    /// What goes with every negative answer.
    pub fn soa(&self, serial: u32) -> Record {
        let under = |labels: &[&str]| self.name(labels);
        let soa = SOA::new(under(&["ns", "dns"]), under(&["hostmaster"]), serial, 7200, 1800, 86_400, TTL);
        Record::from_rdata(self.origin.clone(), TTL, RData::SOA(soa))
    }

    /// `None` when the name is none of ours.
    pub fn answer(&self, model: &Model, name: &Name, wanted: RecordType) -> Option<Answer> {
        let lower = name.to_lowercase();
        if !self.origin.zone_of(&lower) {
            return self.reverse(model, name, wanted);
        }
        let depth = usize::from(lower.num_labels() - self.origin.num_labels());
        let labels: Vec<String> = lower.iter().take(depth).map(|l| String::from_utf8_lossy(l).into_owned()).collect();
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let question = Question { zone: self, model, name, wanted };
        Some(match labels.as_slice() {
            [] => question.apex(),
            ["dns-version"] => question.text(SPECIFICATION),
            ["svc" | "pod" | "dns"] => Answer::nothing(),
            ["ns", "dns"] => question.service("kube-system", "kube-dns").unwrap_or_else(Answer::nothing),
            [namespace, "svc" | "pod"] => Answer::exists(model.has_namespace(namespace)),
            [address, namespace, "pod"] => question.pod(address, namespace),
            [service, namespace, "svc"] => question.service(namespace, service).unwrap_or_else(Answer::no_name),
            [label, service, namespace, "svc"] => question.below_service(label, service, namespace),
            [port, protocol, service, namespace, "svc"] => question.port(port, protocol, service, namespace),
            _ => Answer::no_name(),
        })
    }

    /// Names of our addresses; addresses that are not ours are asked for elsewhere.
    fn reverse(&self, model: &Model, name: &Name, wanted: RecordType) -> Option<Answer> {
        let lower = name.to_lowercase();
        if !lower.to_ascii().ends_with(".arpa.") {
            return None;
        }
        let network = lower.parse_arpa_name().ok()?;
        if network.prefix_len() != network.max_prefix_len() {
            return None;
        }
        let address = network.addr();
        let mut names = BTreeSet::new();
        for (namespace, service) in model.owners(address) {
            match model.service(namespace, service).map(|service| &service.kind) {
                Some(Kind::Virtual(addresses)) if addresses.contains(&address) => {
                    names.insert(self.name(&[service, namespace, "svc"]));
                }
                Some(Kind::Headless) => {
                    let endpoints = model.slices(namespace, service).flat_map(|slice| &slice.endpoints);
                    let labels = endpoints.filter(|e| e.address == address).map(Endpoint::label);
                    names.extend(labels.map(|label| self.name(&[&label, service, namespace, "svc"])));
                }
                _ => {}
            }
        }
        if names.is_empty() {
            return None;
        }
        if wanted != RecordType::PTR {
            return Some(Answer::nothing());
        }
        let records = names.into_iter().map(|n| Record::from_rdata(name.clone(), TTL, RData::PTR(PTR(n))));
        Some(Answer::new(records.collect()))
    }

    /// A name below the origin. Labels come from Kubernetes names, which are valid and short.
    fn name(&self, labels: &[&str]) -> Name {
        let relative = Name::from_labels(labels.iter().map(|label| label.as_bytes()));
        relative.and_then(|name| name.append_domain(&self.origin)).unwrap_or_else(|error| {
            tracing::warn!(%error, ?labels, "name cannot be written");
            self.origin.clone()
        })
    }
}

/// One question about a name in the zone.
struct Question<'a> {
    zone: &'a Zone,
    model: &'a Model,
    /// As asked, in the asker's mix of cases: records repeat it.
    name: &'a Name,
    wanted: RecordType,
}

impl Question<'_> {
    fn record(&self, data: RData) -> Record {
        Record::from_rdata(self.name.clone(), TTL, data)
    }

    fn apex(&self) -> Answer {
        match self.wanted {
            RecordType::NS => Answer::new(vec![self.record(RData::NS(NS(self.zone.name(&["ns", "dns"]))))]),
            RecordType::SOA => Answer::new(vec![self.zone.soa(1)]),
            _ => Answer::nothing(),
        }
    }

    fn text(&self, text: &str) -> Answer {
        match self.wanted {
            RecordType::TXT => Answer::new(vec![self.record(RData::TXT(TXT::new(vec![text.to_owned()])))]),
            _ => Answer::nothing(),
        }
    }

    /// Those of `addresses` that are of the wanted family.
    fn addresses(&self, addresses: impl Iterator<Item = IpAddr>) -> Answer {
        let records = addresses.filter_map(|address| match (address, self.wanted) {
            (IpAddr::V4(_), RecordType::A) | (IpAddr::V6(_), RecordType::AAAA) => Some(self.record(data(address))),
            _ => None,
        });
        Answer::new(records.collect())
    }

    /// `10-244-1-5.namespace.pod`: an address in words, for whoever needs a name; it says nothing about a pod.
    fn pod(&self, dashed: &str, namespace: &str) -> Answer {
        let address = dashed.replace('-', ".").parse().map(IpAddr::V4);
        let address = address.or_else(|_| dashed.replace('-', ":").parse().map(IpAddr::V6));
        match address {
            Ok(address) if self.model.has_namespace(namespace) => self.addresses(std::iter::once(address)),
            _ => Answer::no_name(),
        }
    }

    fn service(&self, namespace: &str, name: &str) -> Option<Answer> {
        let service = self.model.service(namespace, name)?;
        if self.wanted == RecordType::SRV && !matches!(service.kind, Kind::External(_)) {
            return Some(self.services(service, namespace, name, |_| true));
        }
        Some(match &service.kind {
            Kind::Virtual(addresses) => self.addresses(addresses.iter().copied()),
            Kind::External(target) => self.alias(target),
            Kind::Headless => {
                let addresses: BTreeSet<IpAddr> = self.endpoints(namespace, name).map(|e| e.address).collect();
                // As for any name without records, so that clients can tell it from one with the other family.
                if addresses.is_empty() { Answer::no_name() } else { self.addresses(addresses.into_iter()) }
            }
        })
    }

    fn endpoints(&self, namespace: &str, service: &str) -> impl Iterator<Item = &Endpoint> {
        self.model.slices(namespace, service).flat_map(|slice| &slice.endpoints)
    }

    fn alias(&self, target: &Name) -> Answer {
        let mut answer = Answer::new(vec![self.record(RData::CNAME(CNAME(target.clone())))]);
        if self.wanted == RecordType::CNAME {
            return answer;
        }
        match self.zone.answer_once(self.model, target, self.wanted) {
            Some(further) => answer.records.extend(further.records),
            None => answer.follow = Some(target.clone()),
        }
        answer
    }

    /// `hostname.service.namespace.svc`, or `_tcp` as the name between a service and its ports.
    fn below_service(&self, label: &str, name: &str, namespace: &str) -> Answer {
        let Some(service) = self.model.service(namespace, name) else { return Answer::no_name() };
        if let Some(protocol) = label.strip_prefix('_') {
            return Answer::exists(service.ports.iter().any(|port| *port.protocol == *protocol));
        }
        if service.kind != Kind::Headless {
            return Answer::no_name();
        }
        let found: BTreeSet<IpAddr> =
            self.endpoints(namespace, name).filter(|e| e.label() == label).map(|e| e.address).collect();
        if found.is_empty() { Answer::no_name() } else { self.addresses(found.into_iter()) }
    }

    /// `_http._tcp.service.namespace.svc`
    fn port(&self, port: &str, protocol: &str, name: &str, namespace: &str) -> Answer {
        let (Some(port), Some(protocol)) = (port.strip_prefix('_'), protocol.strip_prefix('_')) else {
            return Answer::no_name();
        };
        let Some(service) = self.model.service(namespace, name) else { return Answer::no_name() };
        let answer = self.services(service, namespace, name, |p| *p.name == *port && *p.protocol == *protocol);
        match (answer.records.is_empty(), self.wanted) {
            (true, _) => Answer::no_name(),
            (false, RecordType::SRV) => answer,
            (false, _) => Answer::nothing(),
        }
    }

    fn services(&self, service: &Service, namespace: &str, name: &str, wants: impl Fn(&Port) -> bool) -> Answer {
        let mut answer = Answer::nothing();
        match &service.kind {
            Kind::External(_) => {}
            Kind::Virtual(addresses) => {
                let target = self.zone.name(&[name, namespace, "svc"]);
                for port in service.ports.iter().filter(|port| wants(port)) {
                    answer.records.push(self.srv(port, &target));
                }
                if !answer.records.is_empty() {
                    answer.additionals = addresses.iter().map(|address| at(&target, *address)).collect();
                }
            }
            Kind::Headless => {
                for slice in self.model.slices(namespace, name) {
                    self.endpoint_services(slice, namespace, name, &wants, &mut answer);
                }
            }
        }
        answer
    }

    fn endpoint_services(
        &self,
        slice: &Slice,
        namespace: &str,
        name: &str,
        wants: impl Fn(&Port) -> bool,
        answer: &mut Answer,
    ) {
        for endpoint in &slice.endpoints {
            let target = self.zone.name(&[&endpoint.label(), name, namespace, "svc"]);
            let before = answer.records.len();
            answer.records.extend(slice.ports.iter().filter(|port| wants(port)).map(|port| self.srv(port, &target)));
            if answer.records.len() > before {
                answer.additionals.push(at(&target, endpoint.address));
            }
        }
    }

    fn srv(&self, port: &Port, target: &Name) -> Record {
        self.record(RData::SRV(SRV::new(0, SRV_WEIGHT, port.port, target.clone())))
    }
}

impl Zone {
    /// Follows an alias into the zone, but no further: an alias of an alias may be a circle.
    fn answer_once(&self, model: &Model, name: &Name, wanted: RecordType) -> Option<Answer> {
        let lower = name.to_lowercase();
        if !self.origin.zone_of(&lower) {
            return None;
        }
        let labels: Vec<String> =
            lower.iter().take(3).map(|label| String::from_utf8_lossy(label).into_owned()).collect();
        let again = match labels.as_slice() {
            [service, namespace, svc] if svc == "svc" => model.service(namespace, service),
            _ => None,
        };
        match again.map(|service| &service.kind) {
            Some(Kind::External(_)) => Some(Answer::nothing()),
            _ => self.answer(model, name, wanted),
        }
    }
}

fn data(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(v4) => RData::A(v4.into()),
        IpAddr::V6(v6) => RData::AAAA(v6.into()),
    }
}

fn at(name: &Name, address: IpAddr) -> Record {
    Record::from_rdata(name.clone(), TTL, data(address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{service, slice};
    use serde_json::json;

    pub(crate) fn model() -> Model {
        let mut model = Model::default();
        model.set_namespace("shop");
        model.set_service(&service(
            "shop",
            "web",
            json!({"clusterIPs": ["10.96.0.5", "fd00::5"],
            "ports": [{"name": "HTTP", "port": 80}, {"name": "dns", "protocol": "UDP", "port": 53}]}),
        ));
        model.set_service(&service(
            "shop",
            "db",
            json!({"clusterIP": "None", "ports": [{"name": "sql", "port": 5432}]}),
        ));
        model.set_service(&service("shop", "idle", json!({"clusterIP": "None"})));
        model.set_service(&service("shop", "out", json!({"type": "ExternalName", "externalName": "Example.com"})));
        model.set_service(&service(
            "shop",
            "in",
            json!({"type": "ExternalName", "externalName": "web.shop.svc.cluster.local"}),
        ));
        model.set_service(&service(
            "shop",
            "loop",
            json!({"type": "ExternalName", "externalName": "loop.shop.svc.cluster.local"}),
        ));
        let endpoints = json!([
            {"addresses": ["10.244.1.5"], "hostname": "db-0", "conditions": {"ready": true}},
            {"addresses": ["10.244.1.6"]},
            {"addresses": ["10.244.1.7"], "conditions": {"ready": false}},
        ]);
        model.set_slice(&slice("shop", "db", "db-x", endpoints, json!([{"name": "sql", "port": 5432}])));
        model
    }

    fn ask(name: &str, wanted: RecordType) -> String {
        let zone = Zone::new(Name::from_ascii("cluster.local.").expect("a name"));
        let Some(answer) = zone.answer(&model(), &Name::from_ascii(name).expect("a name"), wanted) else {
            return "elsewhere".to_owned();
        };
        let mut shown: Vec<String> = answer.records.iter().map(|r| format!("{} {}", r.record_type(), r.data)).collect();
        shown.extend(answer.additionals.iter().map(|r| format!("+ {} {}", r.name, r.data)));
        shown.extend(answer.follow.map(|name| format!("-> {name}")));
        if answer.code != ResponseCode::NoError {
            shown.push(format!("{:?}", answer.code));
        }
        shown.join("; ")
    }

    #[test]
    fn names_are_answered_as_the_specification_says() {
        use RecordType::{A, AAAA, CNAME, NS, PTR, SRV, TXT};
        let cases = [
            ("dns-version.cluster.local.", TXT, "TXT 1.1.0"),
            ("cluster.local.", NS, "NS ns.dns.cluster.local."),
            ("cluster.local.", A, ""),
            ("web.shop.svc.cluster.local.", A, "A 10.96.0.5"),
            ("WEB.shop.svc.Cluster.Local.", AAAA, "AAAA fd00::5"),
            ("web.shop.svc.cluster.local.", TXT, ""),
            ("web.nowhere.svc.cluster.local.", A, "NXDomain"),
            ("nothing.shop.svc.cluster.local.", A, "NXDomain"),
            ("shop.svc.cluster.local.", A, ""),
            ("nowhere.svc.cluster.local.", A, "NXDomain"),
            ("a.b.c.d.e.svc.cluster.local.", A, "NXDomain"),
            ("db.shop.svc.cluster.local.", A, "A 10.244.1.5; A 10.244.1.6"),
            ("db.shop.svc.cluster.local.", AAAA, ""),
            ("idle.shop.svc.cluster.local.", A, "NXDomain"),
            ("db-0.db.shop.svc.cluster.local.", A, "A 10.244.1.5"),
            ("10-244-1-6.db.shop.svc.cluster.local.", A, "A 10.244.1.6"),
            ("10-244-1-7.db.shop.svc.cluster.local.", A, "NXDomain"),
            ("x.web.shop.svc.cluster.local.", A, "NXDomain"),
            (
                "_http._tcp.web.shop.svc.cluster.local.",
                SRV,
                "SRV 0 100 80 web.shop.svc.cluster.local.; + web.shop.svc.cluster.local. 10.96.0.5; \
                 + web.shop.svc.cluster.local. fd00::5",
            ),
            ("_http._tcp.web.shop.svc.cluster.local.", A, ""),
            ("_http._udp.web.shop.svc.cluster.local.", SRV, "NXDomain"),
            ("_tcp.web.shop.svc.cluster.local.", SRV, ""),
            (
                "_sql._tcp.db.shop.svc.cluster.local.",
                SRV,
                "SRV 0 100 5432 db-0.db.shop.svc.cluster.local.; SRV 0 100 5432 10-244-1-6.db.shop.svc.cluster.local.; \
                 + db-0.db.shop.svc.cluster.local. 10.244.1.5; + 10-244-1-6.db.shop.svc.cluster.local. 10.244.1.6",
            ),
            ("out.shop.svc.cluster.local.", A, "CNAME Example.com.; -> Example.com."),
            ("out.shop.svc.cluster.local.", CNAME, "CNAME Example.com."),
            ("in.shop.svc.cluster.local.", A, "CNAME web.shop.svc.cluster.local.; A 10.96.0.5"),
            ("loop.shop.svc.cluster.local.", A, "CNAME loop.shop.svc.cluster.local."),
            ("10-244-9-9.shop.pod.cluster.local.", A, "A 10.244.9.9"),
            ("fd00--1.shop.pod.cluster.local.", AAAA, "AAAA fd00::1"),
            ("10-244-9-9.nowhere.pod.cluster.local.", A, "NXDomain"),
            ("nine.shop.pod.cluster.local.", A, "NXDomain"),
            ("5.0.96.10.in-addr.arpa.", PTR, "PTR web.shop.svc.cluster.local."),
            ("5.1.244.10.in-addr.arpa.", PTR, "PTR db-0.db.shop.svc.cluster.local."),
            ("9.9.9.10.in-addr.arpa.", PTR, "elsewhere"),
            ("96.10.in-addr.arpa.", PTR, "elsewhere"),
            ("example.com.", A, "elsewhere"),
        ];
        for (name, wanted, expected) in cases {
            assert_eq!(ask(name, wanted), expected, "{name} {wanted}");
        }
    }
}

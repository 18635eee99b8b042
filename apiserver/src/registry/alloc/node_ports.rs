//! Node ports: one bitmap for the whole cluster under upstream's key, changed by compare-and-write.

use std::sync::Arc;

use apimachinery::status::{FieldError, Result, Status};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::band::{lower, pick};
use super::invalid;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Cx, Undo};
use crate::registry::validation::service::needs_health_check;
use crate::server::Server;
use crate::storage::{Expect, Outcome};

/// Lost races for the bitmap before the user is told to try again.
const TRIES: usize = 32;

/// The ports that services may have on every node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub first: u16,
    pub last: u16,
}

impl Range {
    /// `30000-32767`, or upstream's default when the flag is unreadable.
    pub fn parse(text: &str) -> Self {
        let parsed = text.split_once('-').and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
        match parsed {
            Some((first, last)) if first <= last => Self { first, last },
            _ => Self { first: 30_000, last: 32_767 },
        }
    }

    fn size(self) -> u128 {
        u128::from(self.last - self.first) + 1
    }

    fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

/// Which ports of the range are taken, in the form that upstream stores: a big-endian number, bit n for the nth port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitmap(Vec<u8>);

impl Bitmap {
    fn get(&self, bit: usize) -> bool {
        let byte = self.0.len().checked_sub(bit / 8 + 1).map(|index| self.0[index]);
        byte.is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
    }

    pub fn set(&mut self, bit: usize, value: bool) {
        let needed = bit / 8 + 1;
        if needed > self.0.len() {
            let missing = needed - self.0.len();
            self.0.splice(0..0, std::iter::repeat_n(0, missing));
        }
        let index = self.0.len() - needed;
        let mask = 1 << (bit % 8);
        if value {
            self.0[index] |= mask;
        } else {
            self.0[index] &= !mask;
        }
    }

    /// Marks all that is used, and clears what was marked in an earlier look and is still not used.
    pub fn settle(&mut self, before: &Self, used: &Self) {
        let bits = 8 * self.0.len().max(used.0.len());
        for bit in 0..bits {
            if used.get(bit) {
                self.set(bit, true);
            } else if self.get(bit) && before.get(bit) {
                self.set(bit, false);
            }
        }
    }

    /// Without leading zeros, as upstream writes numbers.
    fn bytes(&self) -> &[u8] {
        let zeros = self.0.iter().take_while(|byte| **byte == 0).count();
        &self.0[zeros..]
    }
}

fn key(server: &Server) -> String {
    format!("{}/ranges/servicenodeports", server.config.etcd_prefix)
}

/// What is taken, and the revision of that knowledge (`None`: nothing was ever written, or nothing readable).
async fn load(server: &Server) -> Result<(Option<u64>, Bitmap)> {
    let Some(entry) = server.store.get(&key(server)).await.map_err(Status::internal)? else {
        return Ok((None, Bitmap::default()));
    };
    let stored: Value = serde_json::from_slice(&entry.value).unwrap_or_default();
    let bitmap = match stored["data"].as_str().map(|data| STANDARD.decode(data)) {
        Some(Ok(bytes)) => Bitmap(bytes),
        // Written by somebody else in another form: the services themselves say what is taken.
        _ => super::repair::taken_ports(server),
    };
    Ok((Some(entry.revision), bitmap))
}

/// What is taken now.
pub async fn snapshot(server: &Server) -> Result<Bitmap> {
    load(server).await.map(|(_, bitmap)| bitmap)
}

/// Whether the write was the first on this revision.
async fn store(server: &Server, revision: Option<u64>, bitmap: &Bitmap) -> Result<bool> {
    let object = json!({
        "kind": "RangeAllocation",
        "apiVersion": "v1",
        "metadata": {},
        "range": server.config.service_node_port_range,
        "data": STANDARD.encode(bitmap.bytes()),
    });
    let expect = revision.map_or(Expect::Absent, Expect::Revision);
    let outcome = server.store.put(&key(server), object.to_string().into(), expect, None).await;
    Ok(matches!(outcome.map_err(Status::internal)?, Outcome::Done(_)))
}

/// Changes the bitmap as `change` says, again when somebody else was faster.
pub async fn update<T>(server: &Server, mut change: impl FnMut(&mut Bitmap) -> Result<T> + Send) -> Result<T> {
    for _ in 0..TRIES {
        let (revision, bitmap) = load(server).await?;
        let mut changed = bitmap.clone();
        let answer = change(&mut changed)?;
        if changed == bitmap || store(server, revision, &changed).await? {
            return Ok(answer);
        }
    }
    Err(Status::internal("failed to allocate a nodePort: too many concurrent allocations"))
}

/// All node ports of a service, that of its health check included.
pub fn of(service: &Value) -> Vec<u16> {
    let ports = service.list_at(&["spec", "ports"]).iter().map(|port| &port["nodePort"]);
    let mut all: Vec<u16> = ports
        .chain([&service["spec"]["healthCheckNodePort"]])
        .filter_map(|port| u16::try_from(port.as_u64()?).ok().filter(|port| *port != 0))
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Takes the ports that the service names and does not have, and free ones for those that it leaves open.
pub async fn allocate(cx: &Cx<'_>, service: &mut Value, old: Option<&Value>) -> Result<Undo> {
    let range = Range::parse(&cx.server.config.service_node_port_range);
    let has = old.map(of).unwrap_or_default();
    if !wants_any(service) && of(service).iter().all(|port| has.contains(port)) {
        return Ok(Undo::none());
    }
    if !matches!(service.str_at(&["spec", "type"]), "NodePort" | "LoadBalancer") {
        return Ok(Undo::none());
    }
    let original = service.clone();
    let change = |bitmap: &mut Bitmap| -> Result<(Value, Vec<u16>)> {
        let mut chosen = original.clone();
        let taken = choose(&mut chosen, &has, range, bitmap)?;
        Ok((chosen, taken))
    };
    let (chosen, taken) = if cx.dry_run {
        let (_, mut bitmap) = load(cx.server).await?;
        change(&mut bitmap)?
    } else {
        update(cx.server, change).await?
    };
    *service = chosen;
    if cx.dry_run || taken.is_empty() {
        return Ok(Undo::none());
    }
    let server = cx.server.clone();
    Ok(Undo::new(async move {
        if let Err(error) = release(&server, taken).await {
            tracing::warn!(%error, "node ports stay taken until the next repair");
        }
    }))
}

/// Whether a port is left open that the type of the service needs.
fn wants_any(service: &Value) -> bool {
    let spec = &service["spec"];
    let open = |value: &Value| value.as_i64().unwrap_or(0) == 0;
    needs_ports(spec) && spec.list_at(&["ports"]).iter().any(|port| open(&port["nodePort"]))
        || needs_health_check(spec) && open(&spec["healthCheckNodePort"])
}

fn needs_ports(spec: &Value) -> bool {
    spec["type"] == "NodePort" || spec["type"] == "LoadBalancer" && spec["allocateLoadBalancerNodePorts"] != false
}

/// Fills in the ports and marks them; the answer is what was newly taken.
fn choose(service: &mut Value, has: &[u16], range: Range, bitmap: &mut Bitmap) -> Result<Vec<u16>> {
    let mut taken: Vec<u16> = Vec::new();
    let ports = service.list_at(&["spec", "ports"]).to_vec();
    for (index, port) in ports.iter().enumerate() {
        let asked = port["nodePort"].as_u64().and_then(|n| u16::try_from(n).ok()).unwrap_or(0);
        if asked != 0 {
            // TCP and UDP of the same service may share a number.
            if !has.contains(&asked) && !taken.contains(&asked) {
                take(bitmap, range, asked).map_err(|why| {
                    let field = format!("spec.ports[{index}].nodePort");
                    invalid(service, &[FieldError::invalid(field, asked, why)])
                })?;
                taken.push(asked);
            }
        } else if needs_ports(&service["spec"]) {
            let twin = twin(service, &ports, index);
            let number = match twin {
                Some(number) => number,
                None => {
                    let number = take_free(bitmap, range)?;
                    taken.push(number);
                    number
                }
            };
            if let Some(port) = service.list_at_mut(&["spec", "ports"]).and_then(|list| list.get_mut(index)) {
                port.set(&["nodePort"], number);
            }
        }
    }
    if needs_health_check(&service["spec"]) {
        let asked = service["spec"]["healthCheckNodePort"].as_u64().and_then(|n| u16::try_from(n).ok()).unwrap_or(0);
        if asked == 0 {
            let number = take_free(bitmap, range)?;
            taken.push(number);
            service.set(&["spec", "healthCheckNodePort"], number);
        } else if !has.contains(&asked) && !taken.contains(&asked) {
            let why =
                |why| Status::internal(format!("failed to allocate requested HealthCheck NodePort {asked}: {why}"));
            take(bitmap, range, asked).map_err(why)?;
            taken.push(asked);
        }
    }
    Ok(taken)
}

/// The node port of an earlier entry with the same port and another protocol: both get one number.
fn twin(service: &Value, ports: &[Value], index: usize) -> Option<u16> {
    let this = &ports[index];
    let earlier =
        (0..index).find(|n| ports[*n]["port"] == this["port"] && ports[*n]["protocol"] != this["protocol"])?;
    u16::try_from(service["spec"]["ports"][earlier]["nodePort"].as_u64()?).ok()
}

fn take(bitmap: &mut Bitmap, range: Range, port: u16) -> std::result::Result<(), String> {
    if !range.contains(port) {
        let Range { first, last } = range;
        return Err(format!("provided port is not in the valid range. The range of valid ports is {first}-{last}"));
    }
    let bit = usize::from(port - range.first);
    if bitmap.get(bit) {
        return Err("provided port is already allocated".into());
    }
    bitmap.set(bit, true);
    Ok(())
}

fn take_free(bitmap: &mut Bitmap, range: Range) -> Result<u16> {
    let band = lower(range.size(), 16, 128, 32);
    let free = pick(range.size(), band, rand::random(), |bit| bitmap.get(bit as usize));
    let Some(bit) = free else {
        return Err(Status::internal("failed to allocate a nodePort: range is full"));
    };
    bitmap.set(bit as usize, true);
    // The bit is within the range, whose ends are ports.
    Ok(range.first + bit as u16)
}

/// Gives ports back.
pub async fn release(server: &Arc<Server>, ports: Vec<u16>) -> Result<()> {
    let range = Range::parse(&server.config.service_node_port_range);
    let bits: Vec<usize> =
        ports.into_iter().filter(|port| range.contains(*port)).map(|port| usize::from(port - range.first)).collect();
    if bits.is_empty() {
        return Ok(());
    }
    update(server, |bitmap| {
        bits.iter().for_each(|bit| bitmap.set(*bit, false));
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: Range = Range { first: 30_000, last: 32_767 };

    #[test]
    fn bitmaps_are_big_endian_numbers() {
        let mut bitmap = Bitmap::default();
        bitmap.set(0, true);
        bitmap.set(9, true);
        assert_eq!(bitmap.bytes(), [2, 1]);
        assert!(bitmap.get(0) && bitmap.get(9) && !bitmap.get(1) && !bitmap.get(100));
        bitmap.set(9, false);
        assert_eq!(bitmap.bytes(), [1]);
    }

    #[test]
    fn ports_are_taken_once() {
        let mut bitmap = Bitmap::default();
        let mut service = json!({"metadata": {"name": "s"}, "spec": {"type": "NodePort", "ports": [
            {"port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}});
        let taken = choose(&mut service, &[], RANGE, &mut bitmap).unwrap();
        assert_eq!(taken.len(), 2);
        assert_eq!(service["spec"]["ports"][1]["nodePort"], service["spec"]["ports"][2]["nodePort"]);
        let mut other = json!({"metadata": {"name": "o"}, "spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]}});
        let status = choose(&mut other, &[], RANGE, &mut bitmap).unwrap_err();
        let expected = r#"Service "o" is invalid: spec.ports[0].nodePort: Invalid value: 30080: provided port is already allocated"#;
        assert_eq!(status.message, expected);
        assert!(choose(&mut other, &[30080], RANGE, &mut bitmap).unwrap().is_empty());
    }

    #[test]
    fn ranges_are_read_from_the_flag() {
        assert_eq!(Range::parse("30000-32767"), RANGE);
        assert_eq!(Range::parse("1-2"), Range { first: 1, last: 2 });
        assert_eq!(Range::parse("x"), RANGE);
    }
}

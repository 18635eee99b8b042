//! Plays scripts to both servers, step by step, and collects what differs. Each script has a namespace and variables
//! of its own; what one server answered is used only for that server.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::client::{Answer, Client, Request};
use super::compare::{Difference, Plain, differences};
use super::corpus::{Kind, Script, Step, change};
use super::mutate::mutants;
use super::normalize::Normalizer;
use super::server::USERS;
use super::{Error, Result};

/// How many dry runs are under way at once.
const PARALLEL: usize = 8;

/// Ours and upstream's.
pub struct Pair {
    pub ours: Client,
    pub upstream: Client,
}

/// What discovery says about a resource.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub kind: String,
    pub namespaced: bool,
    /// Verbs and subresources.
    pub has: BTreeSet<String>,
}

/// The resources that a server has, by `group/version/resource` as in [`Kind::id`].
pub async fn discover(client: &Client) -> Result<BTreeMap<String, Facts>> {
    const ACCEPT: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let mut found = BTreeMap::new();
    for path in ["/api", "/apis"] {
        let mut request = Request::get(path);
        request.headers.insert("accept".into(), ACCEPT.into());
        let document = client.send(&request).await?.json();
        for group in items(&document["items"]) {
            for version in items(&group["versions"]) {
                let name = group["metadata"]["name"].as_str().unwrap_or_default();
                let version_name = version["version"].as_str().unwrap_or_default();
                let prefix = if name.is_empty() { version_name.to_owned() } else { format!("{name}/{version_name}") };
                for resource in items(&version["resources"]) {
                    let id = format!("{prefix}/{}", resource["resource"].as_str().unwrap_or_default());
                    found.insert(id, facts(resource));
                }
            }
        }
    }
    Ok(found)
}

fn facts(resource: &Value) -> Facts {
    let subresources = items(&resource["subresources"]).iter().map(|s| &s["subresource"]);
    let words = items(&resource["verbs"]).iter().chain(subresources);
    Facts {
        kind: resource["responseKind"]["kind"].as_str().unwrap_or_default().into(),
        namespaced: resource["scope"] == "Namespaced",
        has: words.filter_map(|word| word.as_str().map(str::to_owned)).collect(),
    }
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// One server's side of a script.
struct Side<'a> {
    client: &'a Client,
    saved: BTreeMap<String, String>,
    stored: Value,
}

/// A script that is being played.
pub struct Play<'a> {
    script: String,
    kind: Option<&'a Kind>,
    facts: Facts,
    variables: BTreeMap<String, String>,
    sides: [Side<'a>; 2],
    found: Vec<Difference>,
    pub requests: usize,
}

impl<'a> Play<'a> {
    fn new(pair: &'a Pair, script: &str, kind: Option<&'a Kind>, facts: Facts) -> Self {
        let side = |client| Side { client, saved: BTreeMap::new(), stored: Value::Null };
        // At most a DNS label's 63 letters.
        let namespace: String = script.replace(['/', '.'], "-").chars().take(63).collect();
        let mut variables = BTreeMap::from([("ns".to_owned(), namespace.clone())]);
        for (name, token, _) in USERS {
            variables.insert(format!("token of {name}"), token.into());
        }
        if let Some(kind) = kind {
            let all = format!("{}/{}", kind.api, kind.resource);
            let collection = if facts.namespaced {
                format!("{}/namespaces/{namespace}/{}", kind.api, kind.resource)
            } else {
                all.clone()
            };
            let names = [("name", &kind.full, "full"), ("minimal", &kind.minimal, "minimal")];
            for (variable, object, otherwise) in names {
                let name = object["metadata"]["name"].as_str().unwrap_or(otherwise);
                variables.insert(variable.into(), name.into());
            }
            variables.insert("item".into(), format!("{collection}/{}", variables["name"]));
            variables.insert("kind".into(), facts.kind.clone());
            variables.insert("api version".into(), api_version(kind));
            variables.extend([("all".into(), all), ("collection".into(), collection)]);
        }
        let sides = [side(&pair.ours), side(&pair.upstream)];
        Self { script: script.into(), kind, facts, variables, sides, found: Vec::new(), requests: 0 }
    }

    /// A namespace with the service account that pods run as: no controller makes it here.
    async fn prepare(&mut self) -> Result<()> {
        let namespace = self.variables["ns"].clone();
        let object = json!({"metadata": {"name": namespace}});
        let account = json!({"metadata": {"name": "default"}});
        let mut requests = vec![
            Request::json("POST", "/api/v1/namespaces", &object),
            Request::json("POST", &format!("/api/v1/namespaces/{namespace}/serviceaccounts"), &account),
        ];
        for (path, object) in self.kind.iter().flat_map(|kind| &kind.before) {
            requests.push(Request::json("POST", &self.fill(path, &BTreeMap::new()), object));
        }
        for request in requests {
            for side in &self.sides {
                let answer = side.client.send(&request).await?;
                if !matches!(answer.status, 201 | 409) {
                    let why = format!("{}: {} {:?}", request.path, answer.status, answer.body);
                    return Err(Error::Case { case: self.script.clone(), why });
                }
            }
        }
        Ok(())
    }

    async fn play(&mut self, steps: &[Step]) -> Result<()> {
        for step in steps {
            let wanted = step.needs.split_whitespace().all(|need| match need.strip_prefix('!') {
                Some(not) => !self.has(not),
                None => self.has(need),
            });
            if !wanted {
                continue;
            }
            if step.mutants.is_empty() { self.step(step).await? } else { self.try_mutants(step).await? }
        }
        Ok(())
    }

    fn has(&self, need: &str) -> bool {
        match need {
            "namespaced" => self.facts.namespaced,
            "status-data" => self.kind.is_some_and(|kind| !kind.status.is_null()),
            "answer-only" => self.kind.is_some_and(|kind| kind.answer_only),
            need => self.facts.has.contains(need),
        }
    }

    async fn step(&mut self, step: &Step) -> Result<()> {
        let requests = [self.request(step, 0)?, self.request(step, 1)?];
        if step.keep {
            futures::try_join!(settle(self.sides[0].client, &requests[0]), settle(self.sides[1].client, &requests[1]))?;
        }
        let now = Timestamp::now();
        let (ours, upstream) =
            futures::try_join!(ask(self.sides[0].client, &requests[0]), ask(self.sides[1].client, &requests[1]))?;
        self.requests += 1;
        for (side, answer) in self.sides.iter_mut().zip([&ours, &upstream]) {
            let body = answer.json();
            for (name, pointer) in &step.save {
                let value = body.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
                side.saved.insert(name.clone(), value.to_owned());
            }
            if step.keep {
                side.stored = body;
            }
        }
        let case = format!("{}: {}", self.script, step.title());
        if step.accepted && upstream.status >= 300 && self.kind.is_none_or(|kind| !kind.refused) {
            let answer = String::from_utf8_lossy(&upstream.body).into_owned();
            let ours = "the object in kinds/ should be right".into();
            self.found.push(Difference { case: case.clone(), at: "data".into(), ours, upstream: answer });
        }
        if !step.prepare {
            self.compare(&case, &ours, &upstream, now);
        }
        Ok(())
    }

    fn compare(&mut self, case: &str, ours: &Answer, upstream: &Answer, now: Timestamp) {
        let plain = |answer, side: &Side<'_>| Plain::new(answer, &Normalizer { saved: &side.saved, now });
        let [ours, upstream] = [plain(ours, &self.sides[0]), plain(upstream, &self.sides[1])];
        self.found.extend(differences(case, &ours, &upstream));
    }

    fn request(&self, step: &Step, side: usize) -> Result<Request> {
        let side = &self.sides[side];
        let text = self.fill(&step.request, &side.saved);
        let (method, path) = text.split_once(' ').ok_or_else(|| self.wrong(step, "request: METHOD path"))?;
        let mut headers: BTreeMap<String, String> =
            step.headers.iter().map(|(name, value)| (name.to_lowercase(), self.fill(value, &side.saved))).collect();
        if !step.accept.is_empty() {
            headers.insert("accept".into(), step.accept.clone());
        }
        let body = self.body(step, side)?;
        if !body.is_empty() {
            let content = if step.content.is_empty() { "application/json" } else { &step.content };
            headers.entry("content-type".into()).or_insert_with(|| content.into());
        }
        Ok(Request { method: method.into(), path: path.into(), headers, body: body.into(), events: step.events })
    }

    fn body(&self, step: &Step, side: &Side<'_>) -> Result<String> {
        let mut object = match &step.body {
            Value::Null => return Ok(String::new()),
            Value::String(name) => match name.as_str() {
                "$minimal" => self.object("minimal")?,
                "$full" => self.object("full")?,
                "$stored" => side.stored.clone(),
                text => return Ok(self.fill(text, &side.saved)),
            },
            tree => tree.clone(),
        };
        if let (true, Some(kind)) = (step.with_status, self.kind) {
            object["status"] = kind.status.clone();
        }
        change(&mut object, &step.with).map_err(|why| self.wrong(step, &why))?;
        Ok(self.fill(&object.to_string(), &side.saved))
    }

    /// The kind's object with what every object has.
    fn object(&self, which: &str) -> Result<Value> {
        let Some(kind) = self.kind else {
            return Err(Error::Case { case: self.script.clone(), why: format!("${which}: the script is for no kind") });
        };
        let (object, name) = if which == "minimal" { (&kind.minimal, "minimal") } else { (&kind.full, "name") };
        let mut object = self.complete(kind, object.clone(), &self.variables[name]);
        if which == "full" && !kind.answer_only {
            let metadata = &mut object["metadata"];
            for (field, value) in
                [("labels", json!({"app": "full", "tier": "b"})), ("annotations", json!({"note": "any text"}))]
            {
                if metadata[field].is_null() {
                    metadata[field] = value;
                }
            }
        }
        Ok(object)
    }

    fn complete(&self, kind: &Kind, mut object: Value, name: &str) -> Value {
        if object.is_null() {
            object = Map::new().into();
        }
        for (field, value) in [("apiVersion", api_version(kind)), ("kind", self.facts.kind.clone())] {
            if object[field].is_null() {
                object[field] = value.into();
            }
        }
        if object["metadata"]["name"].is_null() && !kind.answer_only {
            object["metadata"]["name"] = name.into();
        }
        object
    }

    /// The variants and mutants of the kind's objects, as dry runs.
    async fn try_mutants(&mut self, step: &Step) -> Result<()> {
        let Some(kind) = self.kind else { return Err(self.wrong(step, "mutants need a kind")) };
        let pairs = match step.mutants.as_str() {
            "create" => self.wrong_creates(kind)?,
            "update" => self.wrong_updates(kind)?,
            "status" => self.wrong_statuses(),
            _ => return Err(self.wrong(step, "mutants: create, update or status")),
        };
        let request = |object: &Value, side: usize| {
            let step = Step { body: object.clone(), ..step.clone() };
            self.request(&step, side)
        };
        let mut requests = Vec::new();
        for (name, [ours, upstream]) in &pairs {
            let case = format!("{}: {} {name}", self.script, step.title());
            requests.push((case, request(ours, 0)?, request(upstream, 1)?));
        }
        let (ours, upstream) = (self.sides[0].client, self.sides[1].client);
        let now = Timestamp::now();
        let mut answers: Vec<(usize, String, Answer, Answer)> = stream::iter(requests.into_iter().enumerate())
            .map(|(index, (case, one, other))| async move {
                let (ours, upstream) = futures::try_join!(ask(ours, &one), ask(upstream, &other))?;
                Ok::<_, Error>((index, case, ours, upstream))
            })
            .buffer_unordered(PARALLEL)
            .try_collect()
            .await?;
        self.requests += answers.len();
        answers.sort_by_key(|(index, ..)| *index);
        for (_, case, ours, upstream) in answers {
            self.compare(&case, &ours, &upstream, now);
        }
        Ok(())
    }

    fn wrong_creates(&self, kind: &Kind) -> Result<Vec<(String, [Value; 2])>> {
        let full = self.object("full")?;
        let mut bases = vec![(String::new(), full.clone())];
        for (index, object) in kind.more.iter().enumerate() {
            bases.push((format!("more {index} "), self.complete(kind, object.clone(), "more")));
        }
        let mut all = Vec::new();
        for (prefix, base) in &bases {
            all.push((format!("{prefix}whole"), base.clone()));
            all.extend(mutants(base).into_iter().map(|mutant| (format!("{prefix}{}", mutant.name), mutant.object)));
        }
        self.add_variants(kind, &full, &mut all)?;
        Ok(all.into_iter().map(|(name, object)| (name, [object.clone(), object])).collect())
    }

    fn add_variants(&self, kind: &Kind, base: &Value, all: &mut Vec<(String, Value)>) -> Result<()> {
        for changes in &kind.variants {
            let mut object = base.clone();
            let name = Value::Object(changes.clone()).to_string();
            change(&mut object, changes)
                .map_err(|why| Error::Case { case: format!("{}: {name}", self.script), why })?;
            all.push((name, object));
        }
        Ok(())
    }

    /// Both get upstream's stored object, changed, under their own metadata.
    fn wrong_updates(&self, kind: &Kind) -> Result<Vec<(String, [Value; 2])>> {
        let mut base = self.sides[1].stored.clone();
        if let Some(fields) = base.as_object_mut() {
            fields.remove("status");
        }
        let mut all: Vec<(String, Value)> =
            mutants(&base).into_iter().map(|mutant| (mutant.name, mutant.object)).collect();
        self.add_variants(kind, &self.object("full")?, &mut all)?;
        Ok(self.under_own_metadata(all))
    }

    fn wrong_statuses(&self) -> Vec<(String, [Value; 2])> {
        let stored = &self.sides[1].stored;
        let status = json!({"status": stored["status"]});
        let all = mutants(&status).into_iter().map(|mutant| {
            let mut object = stored.clone();
            object["status"] = mutant.object["status"].clone();
            (mutant.name, object)
        });
        self.under_own_metadata(all.collect())
    }

    fn under_own_metadata(&self, all: Vec<(String, Value)>) -> Vec<(String, [Value; 2])> {
        let own = |side: &Side<'_>, object: &Value| {
            let mut object = object.clone();
            object["metadata"] = side.stored["metadata"].clone();
            object
        };
        all.into_iter()
            .map(|(name, object)| (name, [own(&self.sides[0], &object), own(&self.sides[1], &object)]))
            .collect()
    }

    fn fill(&self, text: &str, saved: &BTreeMap<String, String>) -> String {
        let mut text = text.to_owned();
        for (name, value) in self.variables.iter().chain(saved) {
            text = text.replace(&format!("{{{name}}}"), value);
        }
        text
    }

    fn wrong(&self, step: &Step, why: &str) -> Error {
        Error::Case { case: format!("{}: {}", self.script, step.title()), why: why.into() }
    }
}

/// The answer; a server that gives none is compared as well.
async fn ask(client: &Client, request: &Request) -> Result<Answer> {
    match client.send(request).await {
        Err(Error::NoAnswer { why, .. }) => Ok(Answer { body: why.into(), ..Answer::default() }),
        answer => answer,
    }
}

/// Asks until several answers in a row have the same revision.
pub async fn settle(client: &Client, request: &Request) -> Result<()> {
    const ENOUGH: usize = 4;
    const MOST: usize = 40;
    const PAUSE: Duration = Duration::from_millis(40);
    let (mut last, mut same) = (Value::Null, 0);
    for _ in 0..MOST {
        let revision = ask(client, request).await?.json()["metadata"]["resourceVersion"].take();
        same = if revision == last { same + 1 } else { 0 };
        if same >= ENOUGH {
            break;
        }
        last = revision;
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

fn api_version(kind: &Kind) -> String {
    kind.api.trim_start_matches("/apis/").trim_start_matches("/api/").into()
}

/// Plays the steps that are the same for every kind.
pub async fn kind(pair: &Pair, kind: &Kind, facts: &Facts, steps: &[Step]) -> Result<(Vec<Difference>, usize)> {
    let mut play = Play::new(pair, &kind.id(), Some(kind), facts.clone());
    play.prepare().await?;
    play.play(steps).await?;
    Ok((play.found, play.requests))
}

/// Plays a hand-written conversation.
pub async fn script(pair: &Pair, script: &Script) -> Result<(Vec<Difference>, usize)> {
    let mut play = Play::new(pair, &script.name, None, Facts::default());
    play.prepare().await?;
    play.play(&script.steps).await?;
    Ok((play.found, play.requests))
}

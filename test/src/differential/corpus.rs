//! Reads what is asked: kinds with their objects, scripts with their steps. It sends nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Error, Result};

/// Changes of an object: JSON pointers with new values; `null` removes. `/-` appends to a list.
pub type Changes = Map<String, Value>;

/// One resource in one version, and objects of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kind {
    /// `/api/v1`, `/apis/apps/v1`.
    pub api: String,
    pub resource: String,
    /// The least that is accepted.
    pub minimal: Value,
    /// As many fields as go together; the test makes its wrong objects out of it.
    pub full: Value,
    /// Other right and wrong objects: changes of `full`, each tried as a create and as an update.
    #[serde(default)]
    pub variants: Vec<Changes>,
    /// Whole objects beside `full` that are tried and mutated in the same way.
    #[serde(default)]
    pub more: Vec<Value>,
    /// What a controller would write.
    #[serde(default)]
    pub status: Value,
    /// Objects that must be there before, as `[path, object]`.
    #[serde(default)]
    pub before: Vec<(String, Value)>,
    /// Kinds that are only answers to a create have nothing to read, change or delete.
    #[serde(default)]
    pub answer_only: bool,
    /// No object can be made that is accepted without keys of this run: only refusals are compared.
    #[serde(default)]
    pub refused: bool,
}

impl Kind {
    pub fn id(&self) -> String {
        let group = self.api.trim_start_matches("/apis/").trim_start_matches("/api/");
        format!("{group}/{}", self.resource)
    }
}

/// One request, with `{variables}` in its texts.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// `METHOD path`.
    pub request: String,
    /// What tells it from others with the same request.
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub accept: String,
    /// The content type of the body.
    #[serde(default)]
    pub content: String,
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// `$minimal`, `$full`, `$stored` (what a `keep: true` step got), other texts as they are, trees as JSON.
    #[serde(default)]
    pub body: Value,
    /// Changes of the body.
    #[serde(default)]
    pub with: Changes,
    /// The status alone goes into the body: for writes of `/status`.
    #[serde(default)]
    pub with_status: bool,
    /// How many events of a watch to wait for.
    #[serde(default)]
    pub events: Option<usize>,
    /// Variables set from pointers into the answer.
    #[serde(default)]
    pub save: BTreeMap<String, String>,
    /// The answer is `$stored` from now on, once the object has stopped changing: some kinds have controllers inside
    /// the server.
    #[serde(default)]
    pub keep: bool,
    /// Asked only where discovery has this: `namespaced`, `status`, `scale`, `watch`, …
    #[serde(default)]
    pub needs: String,
    /// Nobody's answer to this is compared: it only prepares.
    #[serde(default)]
    pub prepare: bool,
    /// Upstream must accept this: else the data is wrong.
    #[serde(default)]
    pub accepted: bool,
    /// Here the mutants of the kind's objects are tried: `create`, `update` or `status`.
    #[serde(default)]
    pub mutants: String,
}

impl Step {
    /// The step's part of a case's name.
    pub fn title(&self) -> &str {
        if self.name.is_empty() { &self.request } else { &self.name }
    }
}

#[derive(Clone, Debug)]
pub struct Script {
    pub name: String,
    pub steps: Vec<Step>,
}

pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).map_err(|source| Error::File { path: path.into(), source })?;
    // `n` is a name here, not YAML 1.1's "no".
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_str_with_options(&text, options)
        .map_err(|source| Error::Data { path: path.into(), source: Box::new(source) })
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |source| Error::File { path: dir.into(), source };
    let entries = fs::read_dir(dir).map_err(failed)?.collect::<std::io::Result<Vec<_>>>().map_err(failed)?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    paths.sort();
    Ok(paths)
}

pub fn kinds(data: &Path) -> Result<Vec<Kind>> {
    let lists = files(&data.join("kinds"))?.iter().map(|path| read::<Vec<Kind>>(path)).collect::<Result<Vec<_>>>()?;
    Ok(lists.into_iter().flatten().collect())
}

pub fn scripts(data: &Path) -> Result<Vec<Script>> {
    let script = |path: &PathBuf| {
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Script { name, steps: read(path)? })
    };
    files(&data.join("scripts"))?.iter().map(script).collect()
}

/// Applies changes; a pointer that leads nowhere is a mistake in the data.
pub fn change(object: &mut Value, changes: &Changes) -> std::result::Result<(), String> {
    for (pointer, value) in changes {
        let (parent, last) = pointer.rsplit_once('/').ok_or_else(|| format!("{pointer:?} is no pointer"))?;
        let last = last.replace("~1", "/").replace("~0", "~");
        // The metadata of an object that has none is made.
        if parent == "/metadata" && object["metadata"].is_null() {
            object["metadata"] = Map::new().into();
        }
        match object.pointer_mut(parent) {
            Some(Value::Array(items)) if last == "-" => items.push(value.clone()),
            Some(Value::Array(items)) => {
                let slot = last.parse().ok().and_then(|index: usize| items.get_mut(index));
                *slot.ok_or_else(|| format!("{pointer}: no such item"))? = value.clone();
            }
            Some(Value::Object(fields)) if value.is_null() => {
                fields.remove(&last).ok_or_else(|| format!("{pointer}: nothing to remove"))?;
            }
            Some(Value::Object(fields)) => {
                fields.insert(last, value.clone());
            }
            _ => return Err(format!("{pointer}: {parent} is not there")),
        }
    }
    Ok(())
}

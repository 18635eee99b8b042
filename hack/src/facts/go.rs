//! The little of Go that facts need: struct fields with their types and tags, and what named types stand for.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// One field of a struct.
#[derive(Clone, Debug, Default)]
pub struct Field {
    /// The Go type as written, e.g. `[]*Container`.
    pub go_type: String,
    /// Empty for inlined fields.
    pub json: String,
    pub inline: bool,
    pub omit_empty: bool,
    pub omit_zero: bool,
    pub proto: Option<u16>,
}

/// The types of one package.
#[derive(Debug, Default)]
pub struct Package {
    pub structs: HashMap<String, Vec<Field>>,
    /// `type PullPolicy string` and the like: name to what it stands for.
    pub named: HashMap<String, String>,
}

impl Package {
    pub fn read(folder: &Path) -> Result<Self> {
        let mut package = Self::default();
        for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if name.ends_with(".go") && !name.ends_with("_test.go") && !name.contains("generated") {
                package.parse(&fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?);
            }
        }
        Ok(package)
    }

    fn parse(&mut self, source: &str) {
        let mut lines = source.lines();
        while let Some(line) = lines.next() {
            let Some(declaration) = line.strip_prefix("type ") else { continue };
            let Some((name, kind)) = declaration.split_once(' ') else { continue };
            if !kind.starts_with("struct") {
                self.named.insert(name.to_owned(), kind.trim_start_matches("= ").to_owned());
            } else if !kind.ends_with('}') {
                let body = lines.by_ref().take_while(|line| *line != "}");
                self.structs.insert(name.to_owned(), body.filter_map(field).collect());
            } else {
                self.structs.insert(name.to_owned(), Vec::new());
            }
        }
    }
}

fn field(line: &str) -> Option<Field> {
    let line = line.trim();
    if line.starts_with("//") {
        return None;
    }
    let mut parts = line.split('`');
    let (declaration, tags) = (parts.next()?.trim(), parts.next()?);
    let (name, go_type) = declaration.split_once(char::is_whitespace).unwrap_or((declaration, declaration));
    let go_type = go_type.trim();
    if !name.starts_with(|c: char| c.is_ascii_uppercase() || c == '*') && !name.contains('.') {
        return None;
    }
    let json = tag(tags, "json")?;
    let mut options = json.split(',');
    let json_name = options.next().unwrap_or_default();
    let options: Vec<&str> = options.collect();
    let proto = tag(tags, "protobuf").and_then(|t| t.split(',').nth(1)).and_then(|n| n.parse().ok());
    (json_name != "-").then(|| Field {
        go_type: go_type.to_owned(),
        json: json_name.to_owned(),
        inline: json_name.is_empty() && name == go_type,
        omit_empty: options.contains(&"omitempty"),
        omit_zero: options.contains(&"omitzero"),
        proto,
    })
}

fn tag<'a>(tags: &'a str, key: &str) -> Option<&'a str> {
    let start = tags.find(&format!("{key}:\""))? + key.len() + 2;
    tags[start..].split('"').next()
}

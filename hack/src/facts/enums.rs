//! The values of enumerations, which only the generated functions of upstream's servers know.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Field and values, by definition.
type ByField = HashMap<String, Vec<String>>;

/// The enumerations of all definitions, by the name of the function that makes each.
pub struct Enums(HashMap<String, ByField>);

impl Enums {
    pub fn read(file: &Path) -> Result<Self> {
        let source = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        Ok(Self::parse(&source))
    }

    fn parse(source: &str) -> Self {
        let mut all: HashMap<String, ByField> = HashMap::new();
        let (mut function, mut field) = ("", "");
        for line in source.lines() {
            if let Some(name) = line.strip_prefix("func schema_").and_then(|rest| rest.split('(').next()) {
                function = name;
            } else if let Some(name) = line.strip_prefix("\t\t\t\t\t\"").and_then(|rest| rest.strip_suffix("\": {")) {
                field = name;
            } else if let Some((_, values)) = line.split_once("Enum: ") {
                let values = values.split('"').skip(1).step_by(2).map(str::to_owned).collect();
                all.entry(function.to_owned()).or_default().insert(field.to_owned(), values);
            }
        }
        Self(all)
    }

    /// Those of the definition `io.k8s.api.core.v1.Pod` are in `k8sio_api_core_v1_Pod`, those of
    /// `io.k8s.apimachinery.pkg.apis.meta.v1.Status` in `pkg_apis_meta_v1_Status`.
    pub fn of(&self, definition: &str) -> Option<&ByField> {
        let name = definition.strip_prefix("io.k8s.")?;
        let function = match name.strip_prefix("api.") {
            Some(rest) => format!("k8sio_api_{rest}"),
            None => name.split_once('.')?.1.to_owned(),
        };
        self.0.get(&function.replace('.', "_"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enumerations_are_found_by_definition_and_field() {
        let source = "func schema_k8sio_api_core_v1_Thing(ref common.ReferenceCallback) common.OpenAPIDefinition {\n\
            \t\t\t\t\t\"kind\": {\n\t\t\t\t\t\t\tType: []string{\"string\"},\n\
            \t\t\t\t\t\"policy\": {\n\t\t\t\t\t\t\tEnum:        []interface{}{\"Always\", \"Never\"},\n";
        let enums = Enums::parse(source);
        let thing = enums.of("io.k8s.api.core.v1.Thing").expect("the definition");
        assert_eq!(thing.get("policy"), Some(&vec!["Always".to_owned(), "Never".to_owned()]));
        assert_eq!(thing.get("kind"), None);
    }
}

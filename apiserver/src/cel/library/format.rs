//! Named formats: `format.dns1123Label().validate(text)` is nothing when the text has the format, else what is wrong.

use apimachinery::meta::validation::{
    is_dns1035_label, is_dns1123_label, is_dns1123_subdomain, is_qualified_name, is_valid_label_value,
};
use cel::common::types::{CelOptional, CelString, STRING_TYPE};
use cel::common::value::{CowVal, Val};
use cel::{DeclarationError, Env, ExecutionError};

use super::text::texts;
use super::url::parse_request_uri;
use super::value_type;

/// What is wrong with a text.
type Check = fn(&str) -> Vec<String>;

#[derive(Clone, Copy, Debug)]
struct Format {
    name: &'static str,
    check: Check,
}

value_type!(Format, "kubernetes.NamedFormat");

impl PartialEq for Format {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

const FORMATS: [Format; 13] = [
    Format { name: "dns1123Label", check: is_dns1123_label },
    Format { name: "dns1123Subdomain", check: is_dns1123_subdomain },
    Format { name: "dns1035Label", check: is_dns1035_label },
    Format { name: "qualifiedName", check: is_qualified_name },
    Format { name: "dns1123LabelPrefix", check: |text| is_dns1123_label(&with_dash_masked(text)) },
    Format { name: "dns1123SubdomainPrefix", check: |text| is_dns1123_subdomain(&with_dash_masked(text)) },
    Format { name: "dns1035LabelPrefix", check: |text| is_dns1035_label(&with_dash_masked(text)) },
    Format { name: "labelValue", check: is_valid_label_value },
    Format { name: "uri", check: |text| parse_request_uri(text).err().into_iter().collect() },
    Format { name: "uuid", check: |text| unless(is_uuid(text), "does not match the UUID format") },
    Format { name: "byte", check: |text| unless(is_base64(text), "invalid base64") },
    Format { name: "date", check: |text| unless(text.parse::<jiff::civil::Date>().is_ok(), "invalid date") },
    Format { name: "datetime", check: |text| unless(text.parse::<jiff::Timestamp>().is_ok(), "invalid datetime") },
];

pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_type(Format::cel_type().to_owned())?;
    cel::add_overload!(env, fn named: (CelString) -> CelOptional, name = "format.named")?;
    env.add_member_overload("validate", "format-validate", Format::cel_type().to_owned(), vec![STRING_TYPE], validate)?;
    cel::add_overload!(env, fn dns1123_label: () -> Format, name = "format.dns1123Label")?;
    cel::add_overload!(env, fn dns1123_subdomain: () -> Format, name = "format.dns1123Subdomain")?;
    cel::add_overload!(env, fn dns1035_label: () -> Format, name = "format.dns1035Label")?;
    cel::add_overload!(env, fn qualified_name: () -> Format, name = "format.qualifiedName")?;
    cel::add_overload!(env, fn dns1123_label_prefix: () -> Format, name = "format.dns1123LabelPrefix")?;
    cel::add_overload!(env, fn dns1123_subdomain_prefix: () -> Format, name = "format.dns1123SubdomainPrefix")?;
    cel::add_overload!(env, fn dns1035_label_prefix: () -> Format, name = "format.dns1035LabelPrefix")?;
    cel::add_overload!(env, fn label_value: () -> Format, name = "format.labelValue")?;
    cel::add_overload!(env, fn uri: () -> Format, name = "format.uri")?;
    cel::add_overload!(env, fn uuid: () -> Format, name = "format.uuid")?;
    cel::add_overload!(env, fn byte: () -> Format, name = "format.byte")?;
    cel::add_overload!(env, fn date: () -> Format, name = "format.date")?;
    cel::add_overload!(env, fn datetime: () -> Format, name = "format.datetime")
}

macro_rules! formats {
    ($($function:ident = $index:literal),*) => {
        $(fn $function() -> Format {
            FORMATS[$index]
        })*
    };
}

formats!(
    dns1123_label = 0,
    dns1123_subdomain = 1,
    dns1035_label = 2,
    qualified_name = 3,
    dns1123_label_prefix = 4,
    dns1123_subdomain_prefix = 5,
    dns1035_label_prefix = 6,
    label_value = 7,
    uri = 8,
    uuid = 9,
    byte = 10,
    date = 11,
    datetime = 12
);

fn named(name: &CelString<'_>) -> CelOptional<'static> {
    match FORMATS.iter().find(|format| format.name == name.inner()) {
        Some(format) => CelOptional::of(Box::new(*format)),
        None => CelOptional::none(),
    }
}

fn validate<'b, 'v>(arguments: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let (format, text) = (arguments[0].downcast_ref::<Format>(), arguments[1].downcast_ref::<CelString<'_>>());
    let (Some(format), Some(text)) = (format, text) else {
        return Err(super::failure("validate", "wants a format and a string"));
    };
    let problems = (format.check)(text.inner());
    Ok(CowVal::owned(match problems.is_empty() {
        true => CelOptional::none(),
        false => CelOptional::of(Box::new(texts(problems.into_iter()))),
    }))
}

fn unless(holds: bool, problem: &str) -> Vec<String> {
    if holds { vec![] } else { vec![problem.to_owned()] }
}

/// What starts a name may end with a dash.
fn with_dash_masked(text: &str) -> String {
    match text.strip_suffix('-') {
        Some(start) if !start.is_empty() => format!("{start}a"),
        _ => text.to_owned(),
    }
}

fn is_uuid(text: &str) -> bool {
    let hyphens = text.len() == 36 || text.len() == 32;
    hyphens && ::uuid::Uuid::parse_str(text).is_ok()
}

fn is_base64(text: &str) -> bool {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(text).is_ok()
}

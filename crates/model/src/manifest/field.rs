//! A value of the file together with its path: reads it as a type, or reports why it is none.
//!
//! Reading functions return `None` after they reported an error, so that reading goes on elsewhere.

use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::str::FromStr;

use super::error::{Place, Report};
use super::interpolate::interpolate;
use super::node::{Kind, Node};
use super::text;

/// Most items of one list, and most entries of one free mapping.
const MAX_ITEMS: usize = 1000;

/// What all fields of one file share.
#[derive(Debug)]
pub(super) struct File<'a> {
    pub report: Report,
    pub vars: &'a BTreeMap<String, String>,
    /// Where relative host paths start.
    pub name: &'a str,
}

#[derive(Debug, Clone)]
pub(super) struct Field<'a> {
    pub file: &'a File<'a>,
    pub path: String,
    pub place: Place,
    /// Where the key that leads here stands; the value's own place if there is none.
    key: Place,
    node: Rc<Node>,
}

/// A key that people know from Compose but that has no meaning here, and what to do instead.
pub(super) type Unsupported = (&'static str, &'static str);

impl<'a> Field<'a> {
    pub fn root(file: &'a File<'a>, node: Rc<Node>) -> Self {
        Self { file, path: String::new(), place: node.place, key: node.place, node }
    }

    fn child(&self, segment: fmt::Arguments<'_>, key: Option<Place>, node: &Rc<Node>) -> Self {
        // Nothing has no place of its own; an aliased value is shown where it is used.
        let place = match (key, &node.kind) {
            (Some(key), Kind::Null) => key,
            _ => node.place,
        };
        let path = format!("{}{segment}", self.path);
        Self { file: self.file, path, place, key: key.unwrap_or(place), node: Rc::clone(node) }
    }

    /// Reports what is wrong with the key that leads here.
    pub fn key_error<T>(&self, message: impl Into<String>, hint: Option<String>) -> Option<T> {
        self.file.report.add(self.key, &self.path, message, hint);
        None
    }

    /// Reports what is wrong here.
    pub fn error<T>(&self, message: impl Into<String>) -> Option<T> {
        self.file.report.add(self.place, &self.path, message, None);
        None
    }

    /// Reports what is wrong here and what to do.
    pub fn error_hint<T>(&self, message: impl Into<String>, hint: impl Into<String>) -> Option<T> {
        self.file.report.add(self.place, &self.path, message, Some(hint.into()));
        None
    }

    pub fn is_null(&self) -> bool {
        matches!(self.node.kind, Kind::Null)
    }

    pub fn is_list(&self) -> bool {
        matches!(self.node.kind, Kind::List(_))
    }

    pub fn is_map(&self) -> bool {
        matches!(self.node.kind, Kind::Map(_))
    }

    pub fn is_anchored(&self) -> bool {
        self.node.anchored
    }

    fn kind(&self) -> &'static str {
        match self.node.kind {
            Kind::Null => "nothing",
            Kind::Scalar(_) => "a single value",
            Kind::List(_) => "a list",
            Kind::Map(_) => "a mapping",
        }
    }

    fn expected<T>(&self, what: &str) -> Option<T> {
        self.error(format!("{what} is expected, this is {}", self.kind()))
    }

    /// The value as text, variables replaced.
    pub fn text(&self) -> Option<String> {
        let Kind::Scalar(raw) = &self.node.kind else { return self.expected("a single value") };
        match interpolate(raw, self.file.vars) {
            Ok(value) if value.contains('\0') => self.error("a NUL character is not allowed"),
            Ok(value) => Some(value),
            Err(error) => self.error_hint(error.to_string(), error.hint()),
        }
    }

    /// Text that says something.
    pub fn filled_text(&self) -> Option<String> {
        let value = self.text()?;
        if value.trim().is_empty() { self.error("the value is empty") } else { Some(value) }
    }

    /// A value of a type whose errors say what is allowed.
    pub fn parsed<T: FromStr<Err: fmt::Display>>(&self) -> Option<T> {
        match self.text()?.parse() {
            Ok(value) => Some(value),
            Err(error) => self.error(format!("{error}")),
        }
    }

    pub fn boolean(&self) -> Option<bool> {
        match self.text()?.as_str() {
            "true" => Some(true),
            "false" => Some(false),
            other => self.error_hint(format!("{other:?} is neither true nor false"), "write true or false"),
        }
    }

    /// A whole number within bounds.
    pub fn number(&self, least: u64, most: u64) -> Option<u64> {
        let value = self.text()?;
        match value.trim().parse::<u64>() {
            Ok(number) if (least..=most).contains(&number) => Some(number),
            _ => self.error(format!("{value:?} is not a whole number from {least} to {most}")),
        }
    }

    pub fn number_u32(&self, least: u32, most: u32) -> Option<u32> {
        self.number(least.into(), most.into()).and_then(|n| u32::try_from(n).ok())
    }

    /// A duration in milliseconds within bounds.
    pub fn duration_ms(&self, least: u64, most: u64) -> Option<u64> {
        let value = self.text()?;
        match text::duration_ms(&value) {
            None => {
                let unit = if value.parse::<f64>().is_ok() { format!("{value}s") } else { "1m30s".to_owned() };
                self.error_hint(format!("{value:?} is not a duration"), format!("write it with its unit, as in {unit}"))
            }
            Some(ms) if !(least..=most).contains(&ms) => {
                self.error(format!("{value:?} is out of range; {least} ms to {most} ms are allowed"))
            }
            Some(ms) => Some(ms),
        }
    }

    /// One of the given texts.
    pub fn one_of<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let value = self.text()?;
        if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == value) {
            return Some(*choice);
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.error_hint(format!("{value:?} is not known here"), format!("write one of: {}", names.join(", ")))
    }

    /// The items of a list.
    pub fn items(&self) -> Option<Vec<Self>> {
        let Kind::List(items) = &self.node.kind else { return self.expected("a list") };
        if items.len() > MAX_ITEMS {
            return self.error(format!("the list has {} items, at most {MAX_ITEMS} are allowed", items.len()));
        }
        Some(items.iter().enumerate().map(|(at, item)| self.child(format_args!("[{at}]"), None, item)).collect())
    }

    /// The texts of a list, or of a single value.
    pub fn texts(&self) -> Option<Vec<String>> {
        if !self.is_list() {
            return Some(vec![self.filled_text()?]);
        }
        let items = self.items()?;
        let texts: Vec<_> = items.iter().filter_map(Self::text).collect();
        (texts.len() == items.len()).then_some(texts)
    }

    /// The entries of a mapping whose keys are free. Nothing counts as an empty mapping.
    pub fn entries(&self) -> Option<Vec<(String, Self)>> {
        let entries = match &self.node.kind {
            Kind::Map(entries) => entries,
            Kind::Null => return Some(Vec::new()),
            _ => return self.expected("a mapping"),
        };
        if entries.len() > MAX_ITEMS {
            return self.error(format!("the mapping has {} keys, at most {MAX_ITEMS} are allowed", entries.len()));
        }
        let dot = if self.path.is_empty() { "" } else { "." };
        Some(
            entries
                .iter()
                .map(|(key, node)| {
                    (key.name.clone(), self.child(format_args!("{dot}{}", key.name), Some(key.place), node))
                })
                .collect(),
        )
    }

    /// The entries of a mapping whose keys are given. Every other key is reported, where it stands.
    pub fn known(&self, known: &[&'static str], unsupported: &[Unsupported]) -> Option<Known<'a>> {
        self.known_beside(known, unsupported, |_, _| false)
    }

    /// The same, except for keys of which `passed_over` says that they may stand beside.
    pub fn known_beside(
        &self,
        known: &[&'static str],
        unsupported: &[Unsupported],
        passed_over: impl Fn(&str, &Self) -> bool,
    ) -> Option<Known<'a>> {
        let Kind::Map(raw) = &self.node.kind else {
            return if self.is_null() { Some(Known(BTreeMap::new())) } else { self.expected("a mapping") };
        };
        let mut fields = BTreeMap::new();
        for ((name, field), (key, _)) in self.entries()?.into_iter().zip(raw) {
            if let Some(name) = known.iter().find(|k| **k == name) {
                fields.insert(*name, field);
                continue;
            }
            if passed_over(&name, &field) {
                continue;
            }
            let hint = match unsupported.iter().find(|(key, _)| *key == name) {
                Some((_, instead)) => (*instead).to_owned(),
                None => match text::nearest(&name, known.iter().copied()) {
                    Some(near) => format!("did you mean {near:?}?"),
                    None if name.starts_with("x-") => {
                        format!("remove it; a fragment for use elsewhere needs an anchor, {name}: &NAME")
                    }
                    None if known.is_empty() => "remove it, there are no settings here".to_owned(),
                    None => format!("supported here: {}", known.join(", ")),
                },
            };
            self.file.report.add(key.place, &field.path, format!("the key {name:?} is not supported"), Some(hint));
        }
        Some(Known(fields))
    }

    /// A mapping of texts, or a list of `NAME=value`. Where a value is missing, `missing` gives it.
    pub fn pairs(&self, missing: impl Fn(&Self, &str) -> Option<String>) -> Option<BTreeMap<String, String>> {
        let mut pairs = BTreeMap::new();
        if self.is_list() {
            for item in self.items()? {
                let Some(line) = item.text() else { continue };
                let (name, value) = match line.split_once('=') {
                    Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                    None => (line.clone(), missing(&item, &line)),
                };
                let Some(value) = value else { continue };
                if name.is_empty() {
                    item.error::<()>(format!("{line:?} has no name before '='"));
                } else if pairs.insert(name.clone(), value).is_some() {
                    item.error::<()>(format!("{name} is here twice"));
                }
            }
            return Some(pairs);
        }
        for (name, field) in self.entries()? {
            let value = if field.is_null() { missing(&field, &name) } else { field.text() };
            if name.is_empty() || name.contains(['=', '\0']) {
                field.error::<()>(format!("{name:?} cannot be a name"));
            }
            pairs.extend(value.map(|value| (name, value)));
        }
        Some(pairs)
    }
}

/// The known fields of a mapping; one that holds nothing counts as absent.
pub(super) struct Known<'a>(BTreeMap<&'static str, Field<'a>>);

impl<'a> Known<'a> {
    pub fn get(&self, key: &str) -> Option<&Field<'a>> {
        self.0.get(key).filter(|field| !field.is_null())
    }
}

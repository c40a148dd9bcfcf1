//! YAML (1.2) as a tree that knows its places in the file. Anchors, aliases and merge keys (`<<`) are
//! resolved here.

use std::rc::Rc;

use saphyr_parser::{Event, Parser, ScalarStyle, Span, Tag};

use super::error::{Place, Report};

/// Longest file, in bytes.
const MAX_FILE_BYTES: usize = 1024 * 1024;
/// Deepest nesting of lists and mappings.
const MAX_DEPTH: usize = 32;
/// Most values, counting an aliased value each time it is used.
const MAX_NODES: usize = 10_000;

#[derive(Debug)]
pub(super) struct Node {
    pub place: Place,
    /// Whether `&name` marks it for use elsewhere.
    pub anchored: bool,
    pub kind: Kind,
    /// Values below and including this one.
    size: usize,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// Nothing, `~` or `null`.
    Null,
    Scalar(String),
    List(Vec<Rc<Node>>),
    /// In the order of the file, each key once.
    Map(Vec<(Key, Rc<Node>)>),
}

#[derive(Debug, Clone)]
pub(super) struct Key {
    pub name: String,
    pub place: Place,
}

/// What is being read: a list, or a mapping with the key whose value comes next.
struct Open {
    place: Place,
    anchor: usize,
    container: Container,
    size: usize,
}

enum Container {
    List(Vec<Rc<Node>>),
    Map { entries: Vec<(Key, Rc<Node>)>, merged: Vec<Rc<Node>>, key: Option<Key> },
}

/// Reads the only document of `text`. `None`: it is empty, or an error was reported.
pub(super) fn load(text: &str, report: &Report) -> Option<Rc<Node>> {
    let start = Place { line: 1, column: 1 };
    if text.len() > MAX_FILE_BYTES {
        let message = format!("the file has {} bytes, at most {MAX_FILE_BYTES} are read", text.len());
        report.add(start, "", message, None);
        return None;
    }
    let mut loader = Loader { report, open: Vec::new(), anchors: Vec::new(), nodes: 0, root: None };
    for event in Parser::new_from_str(text) {
        match event {
            Ok((event, span)) => loader.event(event, span)?,
            Err(error) => {
                let place = place(*error.marker());
                let hint = text
                    .lines()
                    .nth(place.line.saturating_sub(1))
                    .filter(|line| line.trim_start_matches(' ').starts_with('\t') || line.starts_with('\t'))
                    .map(|_| "indent with spaces, YAML does not allow tabs".to_owned());
                report.add(place, "", format!("this is not YAML: {}", error.info()), hint);
                return None;
            }
        }
    }
    match loader.root {
        Some(root) if !matches!(root.kind, Kind::Null) => Some(root),
        _ => {
            let hint = "write at least one service, see examples/shop.yaml".to_owned();
            report.add(start, "", "the file is empty", Some(hint));
            None
        }
    }
}

fn place(marker: saphyr_parser::Marker) -> Place {
    Place { line: marker.line().max(1), column: marker.col() + 1 }
}

struct Loader<'r> {
    report: &'r Report,
    open: Vec<Open>,
    /// Indexed by the parser's number of the anchor.
    anchors: Vec<Option<Rc<Node>>>,
    nodes: usize,
    root: Option<Rc<Node>>,
}

impl Loader<'_> {
    /// Reports an error after which reading on makes no sense.
    fn stop<T>(&self, place: Place, message: impl Into<String>, hint: &str) -> Option<T> {
        let hint = (!hint.is_empty()).then(|| hint.to_owned());
        self.report.add(place, "", message, hint);
        None
    }

    /// `None`: stop reading.
    fn event(&mut self, event: Event<'_>, span: Span) -> Option<()> {
        let place = place(span.start);
        match event {
            Event::DocumentStart(_) if self.root.is_some() => {
                return self.stop(place, "a second document begins", "write one environment per file");
            }
            Event::Scalar(text, style, anchor, tag) => {
                let string = self.check_tag(place, tag.as_deref())? || style != ScalarStyle::Plain;
                let null = !string && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                if !null && self.take_key(place, &text, anchor)? {
                    return Some(());
                }
                if null && self.expects_key() {
                    return self.stop(place, "a key is missing before ':'", "");
                }
                let kind = if null { Kind::Null } else { Kind::Scalar(text.into_owned()) };
                self.value(Node { place, anchored: anchor > 0, kind, size: 1 }, anchor)?;
            }
            Event::SequenceStart(anchor, tag) => {
                self.check_tag(place, tag.as_deref())?;
                self.begin(place, anchor, Container::List(Vec::new()))?;
            }
            Event::MappingStart(anchor, tag) => {
                self.check_tag(place, tag.as_deref())?;
                self.begin(place, anchor, Container::Map { entries: Vec::new(), merged: Vec::new(), key: None })?;
            }
            Event::SequenceEnd | Event::MappingEnd => self.end()?,
            Event::Alias(anchor) => {
                if self.expects_key() {
                    return self.stop(place, "an alias cannot be a key", "");
                }
                let Some(node) = self.anchors.get(anchor).cloned().flatten() else {
                    return self.stop(place, "the alias refers to a value that contains it, or to none", "");
                };
                self.attach(node)?;
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) | Event::DocumentEnd => {}
        }
        Some(())
    }

    /// Whether the tag makes a string of the value; other tags than YAML's own are refused.
    fn check_tag(&self, place: Place, tag: Option<&Tag>) -> Option<bool> {
        match tag {
            None => Some(false),
            Some(tag) if tag.is_yaml_core_schema() => Some(tag.suffix == "str"),
            Some(tag) => {
                self.stop(place, format!("the tag {}{} is not supported", tag.handle, tag.suffix), "remove it")
            }
        }
    }

    fn expects_key(&self) -> bool {
        matches!(self.open.last(), Some(Open { container: Container::Map { key: None, .. }, .. }))
    }

    /// Takes a scalar as the next key, if a key is due.
    fn take_key(&mut self, place: Place, text: &str, anchor: usize) -> Option<bool> {
        if !self.expects_key() {
            return Some(false);
        }
        if anchor > 0 {
            return self.stop(place, "a key cannot be an anchor", "");
        }
        if let Some(Open { container: Container::Map { entries, key, .. }, .. }) = self.open.last_mut() {
            if let Some((first, _)) = entries.iter().find(|(key, _)| key.name == text) {
                let message = format!("the key {text:?} is here twice, first in line {}", first.place.line);
                return self.stop(place, message, "remove one of them");
            }
            *key = Some(Key { name: text.to_owned(), place });
        }
        Some(true)
    }

    fn begin(&mut self, place: Place, anchor: usize, container: Container) -> Option<()> {
        if self.expects_key() {
            return self.stop(place, "a list or mapping cannot be a key", "quote it if it is meant as text");
        }
        if self.open.len() >= MAX_DEPTH {
            return self.stop(place, format!("lists and mappings are nested more than {MAX_DEPTH} deep"), "");
        }
        self.open.push(Open { place, anchor, container, size: 1 });
        Some(())
    }

    fn end(&mut self) -> Option<()> {
        let Some(Open { place, anchor, container, size }) = self.open.pop() else { return Some(()) };
        let kind = match container {
            Container::List(items) => Kind::List(items),
            Container::Map { mut entries, merged, .. } => {
                // What is written beside `<<` wins, then the first of those merged.
                for source in merged {
                    let Kind::Map(more) = &source.kind else { continue };
                    for (key, node) in more {
                        if !entries.iter().any(|(own, _)| own.name == key.name) {
                            entries.push((key.clone(), Rc::clone(node)));
                        }
                    }
                }
                Kind::Map(entries)
            }
        };
        self.value(Node { place, anchored: anchor > 0, kind, size }, anchor)
    }

    fn value(&mut self, node: Node, anchor: usize) -> Option<()> {
        let node = Rc::new(node);
        if anchor > 0 {
            if self.anchors.len() <= anchor {
                self.anchors.resize(anchor + 1, None);
            }
            self.anchors[anchor] = Some(Rc::clone(&node));
        }
        self.attach(node)
    }

    /// Puts a complete value where it belongs.
    fn attach(&mut self, node: Rc<Node>) -> Option<()> {
        let place = node.place;
        let Some(parent) = self.open.last_mut() else {
            self.root = Some(node);
            return Some(());
        };
        parent.size = parent.size.saturating_add(node.size);
        self.nodes = self.nodes.max(parent.size);
        if self.nodes > MAX_NODES {
            return self.stop(place, format!("the file has more than {MAX_NODES} values, counting repeated ones"), "");
        }
        match &mut parent.container {
            Container::List(items) => items.push(node),
            Container::Map { entries, merged, key } => match key.take() {
                Some(key) if key.name == "<<" => {
                    let sources = match &node.kind {
                        Kind::Map(_) => vec![node],
                        Kind::List(items) if items.iter().all(|i| matches!(i.kind, Kind::Map(_))) => items.clone(),
                        _ => return self.stop(key.place, "only mappings can be merged with '<<'", "write <<: *name"),
                    };
                    merged.extend(sources);
                }
                Some(key) => entries.push((key, node)),
                None => {}
            },
        }
        Some(())
    }
}

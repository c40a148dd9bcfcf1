//! Tables without borders, in the width of the terminal.

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};

use crate::printer::Printer;

/// A table with a head line; rows have as many cells as the head. Nothing at all without rows.
pub fn table(printer: &Printer, head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = empty(printer);
    table.set_header(head.to_vec());
    table.add_rows(rows);
    if table.is_empty() {
        return String::new();
    }
    let mut lines = finish(&mut table);
    if let Some(first) = lines.first_mut() {
        *first = printer.bold(first);
    }
    lines.join("\n")
}

/// Names and values, one pair each line.
pub fn pairs(printer: &Printer, rows: impl IntoIterator<Item = (impl Into<String>, String)>) -> String {
    let mut table = empty(printer);
    table.add_rows(rows.into_iter().map(|(name, value)| vec![name.into(), value]));
    finish(&mut table).join("\n")
}

fn empty(printer: &Printer) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    if let Some(width) = printer.width() {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    table
}

fn finish(table: &mut Table) -> Vec<String> {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect()
}

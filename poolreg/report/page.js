"use strict";
// Sorts, filters and downloads the tables. Without this script they stand as they are.
const data = JSON.parse(document.getElementById("data").textContent);
const FIRST = 50;

function written(value, digits) {
  if (value === null) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (digits === null) return String(value);
  const shape = { minimumFractionDigits: digits, maximumFractionDigits: digits, signDisplay: "negative" };
  return value.toLocaleString("en-US", shape).replace("-", "−");
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function element(name, text, attributes) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  return made;
}

function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = element("a", "", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

function asCsv(columns, rows) {
  const quoted = (value) => {
    const text = value === null ? "" : String(value);
    return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  const lines = [columns.map((column) => column.key), ...rows];
  return lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n";
}

function asJson(columns, rows) {
  const keys = columns.map((column) => column.key);
  const objects = rows.map((row) => Object.fromEntries(row.map((value, i) => [keys[i], value])));
  return JSON.stringify(objects, null, 1) + "\n";
}

function bringToLife(table) {
  const name = table.dataset.table;
  const { columns, rows, total } = data[name];
  const visible = columns.map((_, i) => i).filter((i) => columns[i].look !== "hidden");
  const body = table.tBodies[0];
  const count = table.querySelector(".count");
  const tools = document.querySelector(`.tools[data-table="${name}"]`);
  let chosen = rows, most = FIRST, sorted = -1, direction = 1, words = "";

  function choose() {
    chosen = words
      ? rows.filter((row) => row.some((value) => value !== null && String(value).toLowerCase().includes(words)))
      : [...rows];
    if (sorted >= 0) {
      // What is unknown stays last, whichever the direction.
      chosen.sort((a, b) => {
        const [x, y] = [a[sorted], b[sorted]];
        return x === null || y === null ? compare(x, y) : direction * compare(x, y);
      });
    }
  }

  function show() {
    const lines = chosen.slice(0, most).map((row) => {
      const line = document.createElement("tr");
      for (const i of visible) {
        const cell = element("td", "");
        // A mixture is broken between its partitions, if at all.
        written(row[i], columns[i].digits).split("+").forEach((part, n) => {
          if (n) cell.append("+", element("wbr", ""));
          cell.append(part);
        });
        if (columns[i].look) cell.className = columns[i].look;
        line.append(cell);
      }
      return line;
    });
    body.replaceChildren(...lines);
    const matching = words ? `${chosen.length.toLocaleString("en-US")} matching of ` : "";
    count.textContent = `${lines.length.toLocaleString("en-US")} of ${matching}${total.toLocaleString("en-US")} rows`;
    more.hidden = chosen.length <= most;
  }

  [...table.tHead.rows[0].cells].forEach((head, place) => {
    const i = visible[place];
    const button = element("button", head.textContent, { type: "button" });
    button.addEventListener("click", () => {
      direction = sorted === i ? -direction : 1;
      sorted = i;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      choose();
      show();
    });
    head.replaceChildren(button);
  });

  const label = element("label", "Filter");
  const input = element("input", "", { type: "search", autocomplete: "off" });
  input.addEventListener("input", () => {
    words = input.value.trim().toLowerCase();
    choose();
    show();
  });
  label.append(input);
  const csv = element("button", "CSV", { type: "button", "aria-label": `Download ${name} as CSV` });
  csv.addEventListener("click", () => download(`${name}.csv`, asCsv(columns, chosen), "text/csv"));
  const json = element("button", "JSON", { type: "button", "aria-label": `Download ${name} as JSON` });
  json.addEventListener("click", () => download(`${name}.json`, asJson(columns, chosen), "application/json"));
  const more = element("button", `Show all ${rows.length.toLocaleString("en-US")}`, { type: "button" });
  more.addEventListener("click", () => {
    most = rows.length;
    show();
  });
  more.hidden = rows.length <= most;
  tools.append(label, csv, json, more);
  tools.hidden = false;
  count.setAttribute("aria-live", "polite");
}

document.querySelectorAll("table[data-table]").forEach(bringToLife);

// Paper shows everything.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => opened.forEach((details) => { details.open = false; }));

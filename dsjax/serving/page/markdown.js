"use strict";
// A little Markdown, as nodes. Text of the model reaches the page as text only (`make`, `append`,
// `textContent`), never as markup.

function make(tag, className, ...children) {
  const node = Object.assign(document.createElement(tag), {className});
  node.append(...children);
  return node;
}

const FENCE = /^(\s*)(```+|~~~+)\s*([^`]*)$/,
  ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+/;
const width = (line) => line.match(/^\s*/)[0].replace(/\t/g, "    ").length;

// Lines without `most` columns of indentation, or as many as all of them have; one tab stands for them.
function dedent(lines, most) {
  const least = lines.reduce((n, line) => (line.trim() ? Math.min(n, width(line)) : n), most);
  return least ? lines.map((line) => line.replace(RegExp(`^(\t| {0,${least}})`), "")) : lines;
}

// The index of the line that closes the fence at lines[i], or of the end; i where there is no fence.
function closing(lines, i) {
  const mark = lines[i].match(FENCE)?.[2];
  const closes = (line, k) =>
    k > i && line.match(FENCE)?.[2].startsWith(mark) && !line.match(FENCE)[3].trim();
  return mark ? (lines.findIndex(closes) + 1 || lines.length + 1) - 1 : i;
}

// The text of the item at lines[i], which goes on while lines are blank or further in, and where it ends.
function readItem(lines, i, [marker, margin]) {
  const body = [],
    inside = (line) => !line.trim() || width(line) > width(margin) + ITEM.test(line);
  lines[i] = " ".repeat(marker.length) + lines[i].slice(marker.length);
  do {
    const from = i;
    i = closing(lines, from) + 1;
    body.push(dedent(lines.slice(from, i), marker.length).join("\n"));
  } while (i < lines.length && inside(lines[i]));
  return {body: body.join("\n"), next: i};
}

// Splits text into blocks {kind, lines, ...}. While text arrives, only the last one can change.
function blocks(text) {
  const found = [],
    lines = text.split(/\r\n?|\n/);
  let block = null;
  const open = (kind, more) => found.push((block = {kind, lines: [], ...more}));
  const add = (kind, line) => {
    if (block?.kind !== kind) open(kind);
    block.lines.push(line);
  };
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i],
      fence = line.match(FENCE),
      item = line.match(ITEM);
    const heading = line.match(/^(#{1,6})\s+(.*?)\s*#*$/);
    if (fence) {
      const end = closing(lines, i);
      open("code", {
        language: fence[3].trim(),
        lines: dedent(lines.slice(i + 1, end), width(line)),
      });
      block = null;
      i = end;
    } else if (!line.trim()) {
      if (block?.kind !== "list") block = null;
    } else if (heading)
      block = void open("heading", {level: Math.min(heading[1].length, 3), lines: [heading[2]]});
    else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) block = void open("rule");
    else if (item) {
      const ordered = Boolean(item[2]),
        {body, next} = readItem(lines, i, item);
      if (block?.kind !== "list" || block.ordered !== ordered)
        open("list", {ordered, start: item[2]});
      block.lines.push(body);
      i = next - 1;
    } else if (/^\s*>/.test(line)) add("quote", line.replace(/^\s*> ?/, ""));
    else add("text", line);
  }
  return found;
}

function draw({kind, lines, level, ordered, start, language}, depth = 0) {
  const text = lines.join("\n");
  if (kind === "code") return drawCode(text, language);
  if (kind === "rule") return make("hr");
  const items = () => lines.map((item) => make("li", "", ...inner(item, depth)));
  if (kind === "list")
    return ordered
      ? Object.assign(make("ol", "", ...items()), {start})
      : make("ul", "", ...items());
  if (kind === "quote") return make("blockquote", "", ...inner(text, depth));
  return make(kind === "heading" ? `h${level + 1}` : "p", "", ...inline(text));
}

// What stands in an item or a quote. Text that comes first is no paragraph of its own.
function inner(text, depth) {
  const found = depth < 20 ? blocks(text) : [{kind: "text", lines: [text]}];
  return found.flatMap((block, k) =>
    k || block.kind !== "text" ? draw(block, depth + 1) : inline(block.lines.join("\n")),
  );
}

function drawCode(text, language) {
  const caption = make("figcaption", "", language || "text");
  const copy = make("button", "quiet", "Copy");
  copy.onclick = () =>
    navigator.clipboard.writeText(text).then(
      () => copy.replaceChildren("Copied"),
      () => copy.replaceChildren("Not allowed"),
    );
  if (navigator.clipboard) caption.append(copy); // only where the connection is local or secure
  return make("figure", "", caption, make("pre", "", text));
}

// `code`, **strong**, *emphasis* and line breaks.
function inline(text) {
  const nodes = [];
  const pattern = /`([^`\n]+)`|\*\*(?=\S)([\s\S]*?\S)\*\*|\*(?=[^\s*])([^*\n]*?[^\s*])\*(?!\w)|\n/g;
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    const [all, code, strong, emphasis] = match;
    nodes.push(text.slice(end, match.index));
    if (code) nodes.push(make("code", "", code));
    else if (strong || emphasis)
      nodes.push(make(strong ? "strong" : "em", "", ...inline(strong || emphasis)));
    else nodes.push(make("br"));
    end = match.index + all.length;
  }
  return [...nodes, text.slice(end)];
}

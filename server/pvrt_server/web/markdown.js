"use strict";
// Markdown as elements, never as HTML of the model's: what marked reads becomes text nodes.
const markdown = (() => {
  const element = (tag, ...inside) => {
    const made = document.createElement(tag);
    made.append(...inside);
    return made;
  };
  const link = (token) => {
    if (!/^(https?:|mailto:)/i.test(token.href)) return element("span", token.raw);
    const made = element("a", ...(token.tokens ? inline(token.tokens) : [token.text || token.href]));
    made.href = token.href;
    made.target = "_blank";
    made.rel = "noopener noreferrer";
    return made;
  };
  const inline = (tokens) => tokens.map((token) => {
    switch (token.type) {
      case "strong": case "em": case "del": return element(token.type, ...inline(token.tokens));
      case "codespan": return element("code", token.text);
      case "br": return element("br");
      case "link": return link(token);
      case "image": return link({ ...token, tokens: null });
      case "escape": return token.text;
      case "text": return token.tokens ? element("span", ...inline(token.tokens)) : token.text;
      default: return token.raw;
    }
  });
  const row = (tag, cells) => element("tr", ...cells.map((cell) => element(tag, ...inline(cell.tokens))));
  const item = (entry) => element("li", ...(entry.task ? [entry.checked ? "☑ " : "☐ "] : []), ...blocks(entry.tokens));
  const block = (token) => {
    switch (token.type) {
      case "heading": return element(`h${token.depth}`, ...inline(token.tokens));
      case "paragraph": return element("p", ...inline(token.tokens));
      case "text": return element("span", ...inline(token.tokens ?? [token]));
      case "code": return element("pre", element("code", token.text));
      case "blockquote": return element("blockquote", ...blocks(token.tokens));
      case "hr": return element("hr");
      case "list": {
        const list = element(token.ordered ? "ol" : "ul", ...token.items.map(item));
        if (token.ordered && token.start !== "") list.start = token.start;
        return list;
      }
      case "table": {
        const rows = [row("th", token.header), ...token.rows.map((cells) => row("td", cells))];
        const wide = element("div", element("table", ...rows));
        wide.className = "wide";
        return wide;
      }
      default: return element("p", token.raw);
    }
  };
  const hidden = ["space", "def", "checkbox"];
  const shown = (tokens) => tokens.filter(({ type }) => !hidden.includes(type));
  const blocks = (tokens) => shown(tokens).map(block);
  // Draw a text, whole or as far as it came. Blocks that are as they were stay in place, and so does
  // what is selected in them. More text changes the last block alone: those before it are read again
  // only when the text is whole, for the links that its end may name.
  return (place, text, whole = true) => {
    text = text.replace(/\r\n?/g, "\n");  // as marked counts it
    const drawn = place.drawn?.length === place.childNodes.length ? place.drawn : [];
    const kept = whole ? [] : drawn.slice(0, -1);
    let end = kept.at(-1)?.end ?? 0;
    const tokens = marked.lexer(text.slice(end), { breaks: true, gfm: true });
    const read = tokens.map((token) => ({ token, raw: token.raw, end: end += token.raw.length }));
    const all = [...kept, ...read.filter(({ token }) => !hidden.includes(token.type))];
    let same = kept.length;
    const named = tokens.some(({ type }) => type === "def");
    while (!named && same < all.length && all[same].raw === drawn[same]?.raw) same += 1;
    while (place.childNodes.length > same) place.lastChild.remove();
    place.append(...all.slice(same).map(({ token }) => block(token)));
    place.drawn = all.map(({ raw, end }) => ({ raw, end }));
  };
})();

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
  const shown = (tokens) => tokens.filter(({ type }) => !["space", "def", "checkbox"].includes(type));
  const blocks = (tokens) => shown(tokens).map(block);
  // Blocks that are as they were stay in place, and so does what is selected in them.
  return (place, text) => {
    const tokens = shown(marked.lexer(text, { breaks: true, gfm: true }));
    if (!place.raws || place.childNodes.length !== place.raws.length) {
      place.replaceChildren();
      place.raws = [];
    }
    let same = 0;
    while (same < tokens.length && tokens[same].raw === place.raws[same]) same += 1;
    while (place.childNodes.length > same) place.lastChild.remove();
    place.append(...tokens.slice(same).map(block));
    place.raws = tokens.map(({ raw }) => raw);
  };
})();

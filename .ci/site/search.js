// Which sections of the site answer a search: `index` holds {href, title, name, section, text, weight} each, best first come out.
window.findSections = (index, query, limit) => {
  const escape = (word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  // a word, the beginning of one ("stationar"), and two written as one ("batch norm" finds batchnorm and batch normalisation)
  const whole = words.map((w) => new RegExp("(?<![\\p{L}\\d])" + escape(w) + "s?(?![\\p{L}\\d])", "giu"));
  const start = words.map((w) => new RegExp("(?<![\\p{L}\\d])" + escape(w), "giu"));
  const joined = words.length > 1 ? new RegExp(words.map(escape).join("[\\s-]*"), "iu") : null;
  const count = (pattern, text) => (text.match(pattern) || []).length;
  const strength = (k, text) => count(whole[k], text) + 0.5 * count(start[k], text);
  const score = (entry) => {
    let total = 0;
    for (let k = 0; k < words.length; k++) {
      const inTitle = Math.max(strength(k, entry.title), strength(k, entry.name)), inSection = strength(k, entry.section), inText = strength(k, entry.text);
      if (!(inTitle || inSection || inText)) return 0;
      total += 10 * Math.min(inTitle, 1.5) + 6 * Math.min(inSection, 1.5) + Math.min(4, Math.log2(1 + inText));
    }
    if (joined) total += 12 * joined.test(entry.title) + 8 * joined.test(entry.section) + 6 * joined.test(entry.text);
    if (total && entry.section.toLowerCase() === query.trim().toLowerCase()) total += 12; // the name of a function
    return total * entry.weight;
  };
  return index.map((entry) => [score(entry), entry]).filter(([points]) => points > 0).sort((a, b) => b[0] - a[0]).slice(0, limit).map(([, entry]) => entry);
};

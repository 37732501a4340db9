// Texts on the page whose contrast with what lies behind them is below WCAG AA, as ["ratio text", ...].
() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const paint = canvas.getContext("2d", { willReadFrequently: true });
  const layers = (colors) => {
    paint.clearRect(0, 0, 1, 1);
    for (const color of colors) {
      paint.fillStyle = color;
      paint.fillRect(0, 0, 1, 1);
    }
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const faint = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const judge = (node, text, color) => {
    if (!node.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || node.closest(".offstage, .skip, noscript")) return;
    if (node.closest("fieldset:disabled")) return;
    const backs = [];
    for (let at = node; at; at = at.parentElement) backs.unshift(getComputedStyle(at).backgroundColor);
    const [front, back] = [layers([...backs, color]), layers(backs)].map(luminance);
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    const style = getComputedStyle(node), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) faint.push(`${ratio.toFixed(2)} ${node.className || node.tagName}: ${text.trim().slice(0, 30)}`);
  };
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent, node = walk.currentNode.parentElement;
    if (text.trim() && node.tagName !== "OPTION") judge(node, text, getComputedStyle(node).color);
  }
  for (const field of document.querySelectorAll("input, select, textarea")) {
    if (["checkbox", "radio"].includes(field.type)) continue;
    judge(field, field.value || field.name, getComputedStyle(field).color);
    if (field.placeholder) judge(field, field.placeholder, getComputedStyle(field, "::placeholder").color);
  }
  return faint;
}

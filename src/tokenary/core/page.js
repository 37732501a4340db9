// Draws the plots in the colours of the page, and again when the theme changes.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const themed = (value, style) => {
    if (Array.isArray(value)) return value.map((item) => themed(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
    }
    const name = typeof value === "string" && /^var\((--[a-z]+)\)$/.exec(value);
    return name ? style.getPropertyValue(name[1]).trim() : value;
  };
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = themed(figure, style);
      layout.hoverlabel = {
        ...layout.hoverlabel,
        bgcolor: style.getPropertyValue("--raised").trim(),
        bordercolor: style.getPropertyValue("--line").trim(),
        font: { ...layout.hoverlabel?.font, color: style.getPropertyValue("--ink").trim() },
      };
      Plotly.react(`plot-${id}`, data, layout, { displayModeBar: false, responsive: true });
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();

"use strict";
// One strip: sliders choose a frame and a layer; a patch that is pointed at or focused shows its token.
document.querySelectorAll(".strip").forEach((strip) => {
  const find = (selector) => strip.querySelector(selector);
  const { rows, columns, frames, changes } = JSON.parse(find("script").textContent);
  const size = rows * columns;
  const frameSlider = find("input.frame");
  const layerSlider = find("input.layer");
  const [frameText, layerText] = strip.querySelectorAll("output");
  const buttons = [...strip.querySelectorAll(".thumbnails button")];
  const PRUNED = -1;

  // states[layer][patch]: the patch whose token represents it, or PRUNED
  const states = [];
  let state = Int32Array.from({ length: frames * size }, (_, patch) => patch);
  for (const [patches, roots] of changes) {
    state = state.slice();
    patches.forEach((patch, i) => { state[patch] = roots[i]; });
    states.push(state);
  }

  let frame = 0;
  let layer = states.length - 1;
  let chosen = null; // patch

  const kind = (patch) => {
    const root = states[layer][patch];
    return root === PRUNED ? "pruned" : root === patch ? "kept" : "merged";
  };
  const place = (patch) => {
    const cell = patch % size;
    return `row ${Math.floor(cell / columns) + 1}, column ${cell % columns + 1}`;
  };
  const members = (root) => {
    const found = [];
    states[layer].forEach((other, patch) => { if (other === root) found.push(patch); });
    return found;
  };
  const patches = (count) => `${count} other ${count === 1 ? "patch" : "patches"}`;

  function describe(patch) {
    const where = `Frame ${Math.floor(patch / size) + 1}, ${place(patch)}`;
    const root = states[layer][patch];
    if (root === PRUNED) {
      return `${where}: pruned, gone from layer ${states.findIndex((each) => each[patch] === PRUNED)} on.`;
    }
    const others = members(root).length - 1;
    if (root === patch) return `${where}: kept${others ? `; it also stands for ${patches(others)}` : ""}.`;
    const more = others > 1 ? `, as did ${patches(others - 1)}` : "";
    return `${where}: merged into frame ${Math.floor(root / size) + 1}, ${place(root)}${more}.`;
  }

  // The patches as buttons of a grid, of which one can be reached by Tab
  const cells = [];
  for (let row = 0; row < rows; row++) {
    const line = document.createElement("div");
    line.setAttribute("role", "row");
    for (let column = 0; column < columns; column++) {
      const cell = document.createElement("div");
      cell.setAttribute("role", "gridcell");
      cell.tabIndex = cells.length ? -1 : 0;
      cells.push(cell);
      line.append(cell);
    }
    find(".patches").append(line);
  }

  function outline(paths, name) {
    buttons.forEach((button, f) => {
      const here = paths.filter((patch) => Math.floor(patch / size) === f);
      button.querySelector(`path.${name}`).setAttribute("d", squares(here));
    });
  }
  function squares(list) {
    return list.map((patch) => {
      const cell = patch % size;
      return `M${cell % columns} ${Math.floor(cell / columns)}h1v1h-1z`;
    }).join("");
  }

  function mark() {
    const root = chosen === null ? PRUNED : states[layer][chosen];
    const group = root === PRUNED ? [] : members(root);
    cells.forEach((cell, i) => {
      const patch = frame * size + i;
      const inside = root !== PRUNED && states[layer][patch] === root;
      cell.classList.toggle("root", inside && patch === root);
      cell.classList.toggle("group", inside && patch !== root);
    });
    outline(group.filter((patch) => patch !== root), "group");
    outline(root === PRUNED ? [] : [root], "root");
    find(".patch").textContent = chosen === null ? "No patch is chosen." : describe(chosen);
  }

  function show() {
    const caption = buttons[frame].querySelector(".caption").textContent.split(" · ")[1];
    frameText.textContent = `${frame + 1} of ${frames}, ${caption}`;
    layerText.textContent = `${layer}, of 0 to ${states.length - 1}`;
    frameSlider.value = frame + 1;
    layerSlider.value = layer;
    frameSlider.setAttribute("aria-valuetext", frameText.textContent);
    find(".shown").src = buttons[frame].querySelector("img").src;
    find(".shown").alt = `Frame ${frame + 1}, ${caption}`;
    const count = { kept: 0, merged: 0, pruned: 0 };
    cells.forEach((cell, i) => {
      const what = kind(frame * size + i);
      count[what]++;
      cell.className = `cell ${what}`;
      cell.setAttribute("aria-label", `${place(i)}: ${what}`);
    });
    const all = states[layer].reduce((sum, root, patch) => sum + (root === patch), 0);
    find(".summary").textContent =
      `This frame in layer ${layer}: ${count.kept} kept, ${count.merged} merged, ${count.pruned} pruned. ` +
      `All frames: ${all} of ${frames * size} kept.`;
    buttons.forEach((button, f) => {
      const mine = Array.from({ length: size }, (_, i) => f * size + i);
      for (const what of ["merged", "pruned"]) {
        button.querySelector(`path.${what}`).setAttribute("d", squares(mine.filter((patch) => kind(patch) === what)));
      }
      if (f === frame) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current");
    });
    mark();
  }

  function choose(patch) {
    chosen = patch;
    mark();
  }
  function goTo(newFrame) {
    const focused = cells.indexOf(document.activeElement);
    frame = Math.min(frames - 1, Math.max(0, newFrame));
    if (chosen !== null) chosen = focused < 0 ? null : frame * size + focused;
    show();
  }
  function focusCell(index) {
    cells.forEach((cell, i) => { cell.tabIndex = i === index ? 0 : -1; });
    cells[index].focus();
  }

  frameSlider.addEventListener("input", () => goTo(Number(frameSlider.value) - 1));
  layerSlider.addEventListener("input", () => { layer = Number(layerSlider.value); show(); });
  buttons.forEach((button, f) => button.addEventListener("click", () => goTo(f)));
  cells.forEach((cell, i) => {
    cell.addEventListener("mouseenter", () => choose(frame * size + i));
    cell.addEventListener("focus", () => choose(frame * size + i));
    cell.addEventListener("click", () => focusCell(i));
    cell.addEventListener("keydown", (event) => {
      const column = i % columns;
      const steps = {
        ArrowLeft: column > 0 ? i - 1 : i, ArrowRight: column < columns - 1 ? i + 1 : i,
        ArrowUp: i >= columns ? i - columns : i, ArrowDown: i + columns < size ? i + columns : i,
        Home: i - column, End: i - column + columns - 1,
      };
      if (event.key in steps) focusCell(steps[event.key]);
      else if (event.key === "PageUp") goTo(frame - 1);
      else if (event.key === "PageDown") goTo(frame + 1);
      else return;
      event.preventDefault();
    });
  });
  find(".patches").addEventListener("mouseleave", () => {
    const focused = cells.indexOf(document.activeElement);
    choose(focused < 0 ? null : frame * size + focused);
  });

  const first = states[layer].findIndex((root, patch) => root !== patch); // start where something happened
  frame = first < 0 ? 0 : Math.floor(first / size);
  show();
});

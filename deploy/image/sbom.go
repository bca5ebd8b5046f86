package main

import (
	"cmp"
	"debug/buildinfo"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// writeSBOM says what the programs are made of, from what the Go compiler
// recorded in them: CycloneDX 1.6, JSON. Every module is there once, and each
// program depends on its own.
func writeSBOM(to string, o Options, arch, bin string, programs []string) (err error) {
	bom, err := makeSBOM(o, arch, bin, programs)
	if err != nil {
		return err
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return cdx.NewBOMEncoder(f, cdx.BOMFileFormatJSON).SetPretty(true).SetEscapeHTML(false).EncodeVersion(bom, cdx.SpecVersion1_6)
}

func makeSBOM(o Options, arch, bin string, programs []string) (*cdx.BOM, error) {
	root := cdx.Component{
		BOMRef: "image", Type: cdx.ComponentTypeContainer, Name: "ztun", Version: o.Version,
		Properties: &[]cdx.Property{{Name: "platform", Value: "linux/" + arch}},
	}
	modules := map[string]cdx.Component{}
	var apps []cdx.Component
	var deps []cdx.Dependency
	var refs []string
	for _, p := range programs {
		info, err := buildinfo.ReadFile(filepath.Join(bin, p))
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", p, errNotGo, err)
		}
		digest, err := sha256File(filepath.Join(bin, p))
		if err != nil {
			return nil, err
		}
		app := cdx.Component{
			BOMRef: "program/" + p, Type: cdx.ComponentTypeApplication, Name: p, Version: o.Version,
			Hashes: &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: digest}},
		}
		var uses []string
		for _, m := range modulesOf(info) {
			modules[m.BOMRef] = m
			uses = append(uses, m.BOMRef)
		}
		slices.Sort(uses)
		apps, refs = append(apps, app), append(refs, app.BOMRef)
		deps = append(deps, cdx.Dependency{Ref: app.BOMRef, Dependencies: &uses})
	}
	components := apps
	for _, m := range modules {
		components = append(components, m)
	}
	slices.SortFunc(components, func(a, b cdx.Component) int { return cmp.Compare(a.BOMRef, b.BOMRef) })
	deps = append(deps, cdx.Dependency{Ref: root.BOMRef, Dependencies: &refs})
	slices.SortFunc(deps, func(a, b cdx.Dependency) int { return cmp.Compare(a.Ref, b.Ref) })

	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{Timestamp: o.Epoch.UTC().Format(time.RFC3339), Component: &root}
	bom.Components, bom.Dependencies = &components, &deps
	return bom, nil
}

// modulesOf are the modules that a program was built from, Go's own first.
func modulesOf(info *debug.BuildInfo) []cdx.Component {
	out := []cdx.Component{module("std", strings.TrimPrefix(info.GoVersion, "go"))}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		out = append(out, module(m.Path, m.Version))
	}
	return out
}

// module is named by its package URL (https://github.com/package-url/purl-spec).
func module(path, version string) cdx.Component {
	purl := "pkg:golang/" + strings.ToLower(path) + "@" + strings.ReplaceAll(version, "+", "%2B")
	return cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: path, Version: version, PackageURL: purl}
}

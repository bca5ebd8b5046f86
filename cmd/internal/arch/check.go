package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// check returns one line for each import that breaks the rules.
func check(packages []goPackage) []string {
	var problems []string
	for _, p := range packages {
		name := strings.TrimPrefix(p.ImportPath, module)
		if _, ok := rowOf(name); !ok {
			problems = append(problems, fmt.Sprintf("%s: has no row: give it one in cmd/internal/arch/rules.go", name))
			continue
		}
		for _, to := range p.Imports {
			problems = append(problems, checkImport(name, to)...)
		}
		for _, to := range slices.Concat(p.TestImports, p.XTestImports) {
			problems = append(problems, checkTestImport(name, to)...)
		}
	}
	slices.Sort(problems)
	return slices.Compact(problems)
}

// checkImport judges one import of a package's own files.
func checkImport(from, to string) []string {
	var problems []string
	for _, v := range vocabularies {
		if !within(to, v.prefix) {
			continue
		}
		if !isTestPackage(from) && !slices.Contains(v.allowed, from) {
			problems = append(problems, fmt.Sprintf("%s: imports %s: only %s may", from, to, strings.Join(v.allowed, ", ")))
		}
		break
	}
	target, ours := strings.CutPrefix(to, module)
	if !ours {
		return problems
	}
	fromRow, _ := rowOf(from)
	toRow, ok := rowOf(target)
	switch {
	case !ok:
		// Said once, where the target is checked.
	case isTestPackage(target) && !isTestPackage(from):
		problems = append(problems, fmt.Sprintf("%s: imports %s: a test package is for _test.go files", from, target))
	case slices.Contains(alone, from):
		problems = append(problems, fmt.Sprintf("%s: imports %s: it may import nothing of ours", from, target))
	case isTestPackage(from) && toRow <= fromRow:
		// Next to what it tests.
	case toRow > fromRow:
		problems = append(problems, fmt.Sprintf("%s (row %g): imports %s (row %g): points up", from, fromRow, target, toRow))
	case toRow == fromRow:
		problems = append(problems, fmt.Sprintf("%s (row %g): imports %s: its neighbour", from, fromRow, target))
	}
	return problems
}

// checkTestImport judges one import of _test.go files: neighbours and test
// packages are welcome, what lies above is not.
func checkTestImport(from, to string) []string {
	target, ours := strings.CutPrefix(to, module)
	if !ours || isTestPackage(target) {
		return nil
	}
	fromRow, _ := rowOf(from)
	if toRow, ok := rowOf(target); ok && int(toRow) > int(fromRow) {
		return []string{fmt.Sprintf("%s (row %g): a test imports %s (row %g): points up", from, fromRow, target, toRow)}
	}
	return nil
}

// rowOf returns the row of one of our packages; a test package is on that of
// the package it lies beside.
func rowOf(name string) (float64, bool) {
	if row, ok := rows[name]; ok {
		return row, true
	}
	if name == "fuzz" || strings.HasPrefix(name, "fuzz/") {
		return 3, true
	}
	if isTestPackage(name) {
		return rowOf(path.Dir(name))
	}
	return 0, false
}

func isTestPackage(name string) bool {
	return strings.HasSuffix(path.Base(name), "test") || name == "fuzz" || strings.HasPrefix(name, "fuzz/")
}

// within says whether the import path to is prefix or lies below it.
func within(to, prefix string) bool {
	return to == prefix || strings.HasPrefix(to, strings.TrimSuffix(prefix, "/")+"/")
}

// envReads returns one line for each place outside cmd/internal/config that
// reads an environment variable.
func envReads(packages []goPackage) ([]string, error) {
	readers := []string{"Getenv", "LookupEnv", "Environ", "ExpandEnv"}
	var problems []string
	for _, p := range packages {
		name := strings.TrimPrefix(p.ImportPath, module)
		if name == "cmd/internal/config" || isTestPackage(name) {
			continue
		}
		for _, file := range p.GoFiles {
			fset := token.NewFileSet()
			tree, err := parser.ParseFile(fset, filepath.Join(p.Dir, file), nil, parser.SkipObjectResolution)
			if err != nil {
				return nil, fmt.Errorf("arch: parse %s: %w", file, err)
			}
			ast.Inspect(tree, func(n ast.Node) bool {
				sel, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				if pkg, ok := sel.X.(*ast.Ident); ok && (pkg.Name == "os" || pkg.Name == "syscall") && slices.Contains(readers, sel.Sel.Name) {
					pos := fset.Position(sel.Pos())
					problems = append(problems, fmt.Sprintf("%s/%s:%d: %s.%s: only cmd/internal/config reads the environment", name, filepath.Base(pos.Filename), pos.Line, pkg.Name, sel.Sel.Name))
				}
				return true
			})
		}
	}
	return problems, nil
}

# Everything a developer or a CI runs. `make help` lists the targets.

GO      ?= go
BIN     := bin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.release=$(VERSION)
# Programs that exist: the table of the design names more than today has.
CMDS    := $(notdir $(patsubst %/,%,$(dir $(wildcard cmd/*/main.go))))
IMAGE   ?= ztun
FUZZTIME ?= 3s
ROUNDS  ?= 3
ROWS    ?=
LEGS    ?= .
# An ordinary user, for what must work without root.
NOBODY  := setpriv --reuid 65534 --regid 65534 --clear-groups env HOME=/nonexistent

.DEFAULT_GOAL := help
.PHONY: help build demo test ci race fuzz bench soak e2e lint fmt-check vet staticcheck arch image needs demo-nobody clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build bin/ztun, bin/ztun-proxy ...
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ $(addprefix ./cmd/,$(CMDS))

demo: build ## show a mesh of two nodes on this machine, and check every claim
	$(BIN)/ztun lab demo

test: needs ## run all tests; kernel tests run in namespaces of their own
	$(GO) test $(TESTFLAGS) ./...
	cd deploy/image && $(GO) test $(TESTFLAGS) ./...
	cd deploy/e2e && $(GO) test $(TESTFLAGS) ./chart ./cluster ./table

# What the tests call besides Go. As root on Debian missing tools are
# installed; everybody else is told the one command.
NEEDS := nghttp:nghttp2-client nghttpd:nghttp2-server ip:iproute2 ping:iputils-ping
needs:
	@missing=; for tool in $(NEEDS); do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing$$missing"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null && exit 0; fi; \
	echo "tests need$$missing: sudo apt-get install$$missing" >&2; exit 1

lint: fmt-check vet staticcheck ## gofmt, go vet, staticcheck

fmt-check:
	@bad=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$bad" ] || { echo "gofmt these:"; echo "$$bad"; exit 1; }

vet:
	$(GO) vet ./...
	cd deploy/image && $(GO) vet ./...
	cd deploy/e2e && $(GO) vet ./...

staticcheck:
	$(GO) tool staticcheck ./...
	tool=$$($(GO) tool -n staticcheck) && (cd deploy/image && $$tool ./...) && cd deploy/e2e && $$tool ./...

arch: ## check that imports point down and every package has a row
	$(GO) run ./cmd/internal/arch

# With the race detector: what does not spend its time in the kernel.
race: ## run the tests with the race detector, kernel tests left out
	@command -v gcc >/dev/null || command -v cc >/dev/null || { echo "the race detector needs a C compiler: sudo apt-get install gcc" >&2; exit 1; }
	@set -e; list=$$($(GO) list -f '{{$$kernel := false}}{{range .TestImports}}{{if eq . "github.com/ztun/ztun/tun/netnstest"}}{{$$kernel = true}}{{end}}{{end}}{{range .XTestImports}}{{if eq . "github.com/ztun/ztun/tun/netnstest"}}{{$$kernel = true}}{{end}}{{end}}{{if not $$kernel}}{{.ImportPath}}{{end}}' ./...); \
	echo "$(GO) test -race ($$(echo $$list | wc -w) packages)"; CGO_ENABLED=1 $(GO) test -race $(TESTFLAGS) $$list

# Every Fuzz function of every package, found by asking the packages. Before
# Go 1.27 the end of -fuzztime itself fails now and then (go.dev/issue/75804):
# no input, only "context deadline exceeded". Such a run is made again.
fuzz: ## run every fuzz target for FUZZTIME (3s) each
	@set -e; targets=$$($(GO) test -list '^Fuzz' ./...); log=$$(mktemp); trap 'rm -f '$$log EXIT; \
	echo "$$targets" | awk '/^Fuzz/ {names[++n] = $$1} $$1 == "ok" {for (i = 1; i <= n; i++) print $$2, names[i]; n = 0}' | \
	while read package name; do \
	  for try in 1 2 3 end; do \
	    [ $$try != end ] || exit 1; \
	    if $(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) $$package </dev/null >$$log 2>&1; then \
	      echo "ok  $$package $$name  $$(grep -o 'execs: [0-9]*' $$log | tail -1)"; break; fi; \
	    if ! grep -q '^    context deadline exceeded' $$log || grep -q 'Failing input\|panic:\|hung' $$log; then cat $$log; exit 1; fi; \
	  done; \
	done

SECONDS ?= 3
bench: build ## measure beside the kernel alone: ROUNDS=3 ROWS=regexp LEGS=regexp SECONDS=3 OTHER='another proxy' PROFILE=dir; writes bin/bench.json
	$(GO) build -o $(BIN)/bench ./cmd/internal/bench
	$(BIN)/bench -bin $(BIN) -json $(BIN)/bench.json -rounds $(ROUNDS) $(if $(ROWS),-rows '$(ROWS)') -legs '$(LEGS)' -seconds $(SECONDS) \
		$(if $(OTHER),-other '$(subst ','\'',$(OTHER))') $(if $(PROFILE),-profile '$(PROFILE)')

MINUTES ?= 20
soak: ## a mixed load over bad networks: MINUTES=20 SEED=n ONLY=regexp of worlds and weathers
	@mkdir -p $(BIN)
	$(GO) test -c -o $(BIN)/soak.test ./cmd/internal/soak
	nice -n 10 $(BIN)/soak.test -test.run '^TestSoak$$' -test.timeout 0 -minutes $(MINUTES) $(if $(SEED),-seed $(SEED)) $(if $(ONLY),-only '$(ONLY)')

RUN  ?=
MODE ?= mixed
e2e: NEEDS := nft:nftables iptables:iptables
e2e: needs ## ztun on a cluster of two nodes with an unmodified istiod, as root: RUN=regexp of cases, MODE=mixed (a node each), nftables or iptables for kube-proxy
	@[ "$$(id -u)" = 0 ] || { echo "e2e needs root, for namespaces, mounts and cgroups of nodes: sudo make e2e" >&2; exit 1; }
	@mkdir -p $(BIN)
	cd deploy/e2e && $(GO) test -c -o ../../$(BIN)/e2e.test .
	cd deploy/e2e && MODE='$(MODE)' ../../$(BIN)/e2e.test -test.v -test.timeout 30m $(if $(RUN),-test.run '$(RUN)')

ci: export CI = true
ci: lint arch ## what must hold before a change goes in; .ci/run calls this
	$(MAKE) test TESTFLAGS='-count=1 -timeout 15m'
	$(MAKE) race TESTFLAGS='-count=1 -timeout 15m'
	$(MAKE) fuzz
	$(MAKE) e2e
	$(MAKE) demo
	@[ "$$(id -u)" != 0 ] || $(MAKE) demo-nobody

# The demo as an ordinary user, while /dev/net/tun is open to one. The tree
# may be closed to that user: run a copy.
demo-nobody:
	@set -e; mode=$$(stat -c %a /dev/net/tun); dir=$$(mktemp -d); \
	trap 'chmod '$$mode' /dev/net/tun; rm -rf '$$dir EXIT; trap 'exit 130' INT TERM; \
	chmod 0666 /dev/net/tun; chmod 0755 $$dir; install -m 0755 $(BIN)/ztun $(BIN)/ztun-proxy $$dir/; \
	echo "$$dir/ztun lab demo (as uid 65534)"; cd /; $(NOBODY) $$dir/ztun lab demo

ARCHES  ?= amd64,arm64
image: ## build the image into bin/image, without docker: IMAGE=name VERSION=tag ARCHES=amd64,arm64
	cd deploy/image && $(GO) run . -source ../.. -out ../../$(BIN)/image -name $(IMAGE) -version $(VERSION) -arch $(ARCHES)

clean: ## remove bin/
	rm -rf $(BIN)

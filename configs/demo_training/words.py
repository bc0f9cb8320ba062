"""Word lists for stories, tool calls and questions that the demo model cannot answer."""

# ruff: noqa: E501, SIM905  (word lists read best as packed lines)

from __future__ import annotations

ANIMALS = (
    "fox bear rabbit cat dog mouse owl hedgehog squirrel wolf frog turtle deer badger otter duck "
    "goose horse pony cow sheep goat pig hen sparrow robin crow eagle lion tiger elephant giraffe "
    "monkey penguin whale dolphin seal crab snail bee ant butterfly spider dragon unicorn beaver "
    "mole lizard snake parrot swan donkey camel kangaroo koala panda zebra hippo fish bat"
).split()
NAMES = (
    "Rosa Tom Mia Ben Lily Max Nora Sam Ella Leo Anna Finn Ida Otto Ruby Hugo Clara Emil Zoe Oscar "
    "Maya Felix Alma Jack Lena Theo Nina Paul Vera Noah Ada Carl Eva Luca Greta Milo Hana Omar Yara "
    "Ivan Sofia Amir Kate Bob Alice Peter Maria David Sarah John Emma Ravi Chen Yuki Lars Pia"
).split()
OBJECTS = (
    "key lamp map ball book bell boat cup drum feather flute hat jar kite letter mirror pebble "
    "ribbon ring rope scarf shell spoon stone umbrella wheel whistle basket blanket button candle "
    "coin compass flower lantern pencil clock cookie cake apple star"
).split()
PLACES = (
    "forest|meadow|river|garden|village|mountain|lake|farm|old mill|beach|valley|cave|island|town|"
    "orchard|hill|bridge|castle|field|harbour"
).split("|")
MOODS = "kind brave curious shy clever cheerful quiet gentle proud young old little lazy".split()
CITIES = (
    "Paris London Berlin Rome Madrid Oslo Tokyo Cairo Lima Delhi Sydney Boston Vienna Prague Dublin "
    "Athens Lisbon Seoul Toronto Chicago Denver Munich Zurich Geneva Milan Naples Kyoto Quito "
    "Havana Nairobi Warsaw Helsinki Brussels Hamburg Austin Seattle Mumbai Beijing Istanbul"
).split()
COLOURS = "red blue green yellow black white orange purple brown pink grey silver".split()
FOODS = (
    "apples bananas pears plums nuts eggs cookies cherries lemons carrots potatoes tomatoes books "
    "coins stamps pencils marbles shells flowers balls cards stones"
).split()
TOPICS = (
    "the Roman Empire|Napoleon|the French Revolution|World War II|the moon landing|Julius Caesar|"
    "the Cold War|ancient Egypt|the pyramids|Shakespeare|Mozart|Picasso|Einstein|Newton|Darwin|"
    "Abraham Lincoln|black holes|gravity|photosynthesis|DNA|evolution|quantum physics|relativity|"
    "the solar system|Mars|Jupiter|volcanoes|earthquakes|climate change|the ocean|dinosaurs|"
    "penguins|cats|dogs|horses|football|basketball|tennis|chess|the Olympics|cooking|pasta|pizza|"
    "bread|coffee|tea|wine|chocolate|cancer|diabetes|a headache|the flu|a fever|vaccines|aspirin|"
    "vitamins|sleep|yoga|meditation|the stock market|bitcoin|inflation|taxes|mortgages|insurance|"
    "the economy|politics|the president|democracy|the constitution|love|happiness|philosophy|"
    "Plato|Kant|religion|Buddhism|music|jazz|guitars|pianos|movies|Star Wars|Harry Potter|"
    "Japanese|French|German|Spanish|grammar|poetry|Java|JavaScript|C++|Rust|SQL|HTML|CSS|React|"
    "binary search|quicksort|recursion|linked lists|hash tables|blockchain|cloud computing|"
    "cars|bicycles|airplanes|trains|rockets|robots|phones|computers|television|the weather|rain|"
    "snow|trees|flowers|bees|sharks|fashion|shoes|furniture|gardening|fishing|travel|hotels|"
    "Italy|France|Germany|Spain|Japan|China|India|Brazil|Canada|Russia|Africa|Australia|New York|"
    "California|Paris|London|Tokyo|the Eiffel Tower|the Great Wall|Mount Everest|the Amazon|"
    "algebra|calculus|geometry|statistics|chemistry|atoms|water|gold|iron|oxygen|electricity|"
    "magnets|light|sound|energy|nuclear power|solar panels|batteries|the heart|the brain|blood|"
    "bones|muscles|skin|teeth|eyes|cholesterol|allergies|asthma|depression|anxiety|stress"
).split("|")
OPPOSITES = (
    "hot cold|big small|up down|left right|day night|old new|fast slow|happy sad|open closed|"
    "light dark|high low|near far|wet dry|full empty|early late|strong weak|good bad|long short|"
    "hard soft|rich poor|yes no|black white|start stop|in out|loud quiet|clean dirty|first last"
).split("|")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
COMMON = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name team minute idea body information back parent face "
    "others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education red green small large long great little "
    "own other old high different next early young important few public bad same able say get make "
    "go know take see come think look want give use find tell ask seem feel try leave call hello "
    "sun moon sea wind rain tree bird stone road river table chair window garden bread milk salt"
).split()
